"""Turn answers into the responses of OpenAI's routes: whole, or piece by piece."""

import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from runtime.server import bodies, schemas
from runtime.server.answers import Piece
from runtime.server.tools import Call, Calls
from runtime.text import Tokenizer

_CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"
_IMPOSSIBLE = -9999.0


class Responses(Protocol):
    """The response format of one of the routes.

    Attributes:
        prefix: prefix of the ids of responses.
    """

    prefix: str

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> BaseModel:
        """Return the response, with every answer as one piece."""

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> BaseModel:
        """Return the event for a piece, which begins `start` characters into its answer."""

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> BaseModel:
        """Return the event with the numbers of tokens."""


class CompletionResponses:
    """The response format of /v1/completions; see `Responses`."""

    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, body: bodies.CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.Completion:
        """See `Responses`."""
        return self._completion(head, [self._choice(piece, 0) for piece in pieces], usage=usage)

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> schemas.Completion:
        """See `Responses`."""
        return self._completion(head, [self._choice(piece, start)])

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> schemas.Completion:
        """See `Responses`."""
        return self._completion(head, [], usage=usage)

    def _completion(
        self, head: dict[str, Any], choices: list[schemas.CompletionChoice], **usage: Any
    ) -> schemas.Completion:
        return schemas.Completion(**head, object="text_completion", choices=choices, **usage)

    def _choice(self, piece: Piece, start: int) -> schemas.CompletionChoice:
        return schemas.CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece, start),
            finish_reason=piece.finish,
        )

    def _logprobs(self, piece: Piece, start: int) -> schemas.CompletionLogprobs | None:
        if not self._wanted:
            return None
        offsets, end = [], start
        for token in piece.tokens:
            offsets.append(end)
            end += len(self._tokenizer.text_of(token.id) or "")
        return schemas.CompletionLogprobs(
            tokens=[self._tokenizer.name_of(token.id) for token in piece.tokens],
            # Nothing precedes the first token of a prompt, so it has no log probability.
            token_logprobs=[
                None if token.logprob is None else _finite(token.logprob) for token in piece.tokens
            ],
            top_logprobs=[
                None
                if token.logprob is None
                else {
                    self._tokenizer.name_of(id_): _finite(value)
                    for id_, value in token.alternatives
                }
                for token in piece.tokens
            ],
            text_offset=offsets,
        )


class ChatResponses:
    """The response format of /v1/chat/completions; see `Responses`."""

    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, body: bodies.ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None
        self._has_tools = bool(body.offers)
        # For each answer of a stream: the reader of its calls, and the number of calls so far.
        self._readers: defaultdict[int, Calls] = defaultdict(Calls)
        self._called: Counter[int] = Counter()

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.ChatCompletion:
        """See `Responses`."""
        return schemas.ChatCompletion(
            **head,
            object="chat.completion",
            choices=[self._choice(piece) for piece in pieces],
            usage=usage,
        )

    def _choice(self, piece: Piece) -> schemas.ChatChoice:
        assert piece.finish  # every whole answer has a reason
        text, calls = self._read(piece)
        return schemas.ChatChoice(
            index=piece.index,
            message=schemas.Answer(
                content=text or (None if calls else ""),
                tool_calls=[
                    schemas.ToolCall(id=_call_id(), function=_function(call)) for call in calls
                ]
                or None,
            ),
            logprobs=self._logprobs(piece),
            finish_reason=self._finish(piece) or piece.finish,
        )

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> schemas.ChatCompletionChunk:
        """See `Responses`."""
        first = self._called[piece.index]
        text, calls = self._read(piece)
        delta: dict[str, Any] = {} if start else {"role": "assistant"}
        if text or not self._has_tools:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [
                schemas.ToolCallDelta(
                    index=first + place, id=_call_id(), type="function", function=_function(call)
                )
                for place, call in enumerate(calls)
            ]
        choice = schemas.ChunkChoice(
            index=piece.index,
            delta=schemas.Delta(**delta),
            logprobs=self._logprobs(piece),
            finish_reason=self._finish(piece),
        )
        return schemas.ChatCompletionChunk(**head, object=_CHUNK, choices=[choice])

    def _read(self, piece: Piece) -> tuple[str, list[Call]]:
        """Return the text of a piece, and the calls that are complete with it."""
        if not self._has_tools:
            return piece.text, []
        reader = self._readers[piece.index]
        text, calls = reader.push(piece.text)
        self._called[piece.index] += len(calls)
        return text + (reader.finish() if piece.finish else ""), calls

    def _finish(self, piece: Piece) -> schemas.FinishReason | None:
        calls = piece.finish == "stop" and self._called[piece.index]
        return "tool_calls" if calls else piece.finish

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> schemas.ChatCompletionChunk:
        """See `Responses`."""
        return schemas.ChatCompletionChunk(**head, object=_CHUNK, choices=[], usage=usage)

    def _logprobs(self, piece: Piece) -> schemas.ChatLogprobs | None:
        if not self._wanted:
            return None
        return schemas.ChatLogprobs(
            content=[
                schemas.TokenLogprob(
                    **self._logprob(token.id, token.logprob),
                    top_logprobs=[
                        schemas.Logprob(**self._logprob(*other)) for other in token.alternatives
                    ],
                )
                for token in piece.tokens
            ]
        )

    def _logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert logprob is not None  # set for all tokens of an answer if asked for
        text = self._tokenizer.text_of(token)
        return {
            "token": self._tokenizer.name_of(token),
            "logprob": _finite(logprob),
            "bytes": None if text is None else list(text.encode()),
        }


def _finite(logprob: float) -> float:
    """Return a log probability that JSON can hold: like OpenAI, -9999 for the impossible."""
    return max(logprob, _IMPOSSIBLE)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _function(call: Call) -> schemas.CalledFunction:
    return schemas.CalledFunction(name=call.name, arguments=call.arguments)
