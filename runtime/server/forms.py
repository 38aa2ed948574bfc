"""How the answers of OpenAI's routes are written down: whole, or piece by piece."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from runtime.server import bodies, schemas
from runtime.server.answers import Piece
from runtime.text import Tokenizer

_CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"
_IMPOSSIBLE = -9999.0


class Form(Protocol):
    """How one of the routes writes its answers down.

    Attributes:
        prefix: of the ids of responses.
    """

    prefix: str

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> BaseModel:
        """The response, with every answer as one piece."""

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> BaseModel:
        """The event for a piece that begins after so many characters of its answer."""

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> BaseModel:
        """The event that has the usage."""


class CompletionForm:
    """See `Form`."""

    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, body: bodies.CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.Completion:
        """See `Form`."""
        return self._completion(head, [self._choice(piece, 0) for piece in pieces], usage=usage)

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> schemas.Completion:
        """See `Form`."""
        return self._completion(head, [self._choice(piece, start)])

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> schemas.Completion:
        """See `Form`."""
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
            # The first token of a prompt follows nothing.
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


class ChatForm:
    """See `Form`."""

    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, body: bodies.ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.ChatCompletion:
        """See `Form`."""
        choices = [
            schemas.ChatChoice(
                index=piece.index,
                message=schemas.Answer(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish,
            )
            for piece in pieces
            if piece.finish  # they all have one: for the types
        ]
        return schemas.ChatCompletion(
            **head, object="chat.completion", choices=choices, usage=usage
        )

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> schemas.ChatCompletionChunk:
        """See `Form`."""
        delta: dict[str, Any] = (
            {"content": piece.text} if start else {"role": "assistant", "content": piece.text}
        )
        choice = schemas.ChunkChoice(
            index=piece.index,
            delta=schemas.Delta(**delta),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish,
        )
        return schemas.ChatCompletionChunk(**head, object=_CHUNK, choices=[choice])

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> schemas.ChatCompletionChunk:
        """See `Form`."""
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
        assert logprob is not None  # answers have them where they were asked for
        text = self._tokenizer.text_of(token)
        return {
            "token": self._tokenizer.name_of(token),
            "logprob": _finite(logprob),
            "bytes": None if text is None else list(text.encode()),
        }


def _finite(logprob: float) -> float:
    """A log probability that JSON can hold: OpenAI, too, has -9999 for the impossible."""
    return max(logprob, _IMPOSSIBLE)
