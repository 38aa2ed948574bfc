"""OpenAI's routes for text: completions and chat, whole or as server-sent events.

A stream begins when the first piece of text is there, so that until then a request can still be
refused with a status. Later errors are an event with the error object; [DONE] follows either way.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.server import schemas
from runtime.server.answers import Answers, Piece
from runtime.server.clients import unless_gone
from runtime.server.errors import ErrorBody, RefusedError, too_late
from runtime.server.logs import Record, record_of
from runtime.server.service import Prompt, Served, Service
from runtime.text import Tokenizer

_CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"
_IMPOSSIBLE = -9999.0

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    503: {"model": ErrorBody, "description": "Too much to do; see Retry-After"},
    504: {"model": ErrorBody, "description": "Not finished before the deadline"},
}
router = APIRouter(prefix="/v1", responses=_ERRORS, tags=["OpenAI"])


@router.get("/models")
async def models(service: Served) -> schemas.Models:
    """Which models are served: one."""
    return schemas.Models(data=[_model(service)])


@router.get("/models/{model:path}")
async def model(model: str, service: Served) -> schemas.Model:
    """That model."""
    service.require(model)
    return _model(service)


@router.post("/completions", response_model=schemas.Completion)
async def completions(
    body: schemas.CompletionRequest, request: Request, service: Served
) -> Response:
    """Continue one or more prompts."""
    service.require(body.model)
    encode = service.tokenizer.encode
    prompts = await asyncio.to_thread(
        lambda: [
            tuple(encode(prompt) if isinstance(prompt, str) else prompt) for prompt in body.prompts
        ]
    )
    _note_prompts(request, service, body.prompts)
    return await _respond(request, service, body, prompts, _CompletionForm(service.tokenizer, body))


@router.post("/chat/completions", response_model=schemas.ChatCompletion)
async def chat(body: schemas.ChatRequest, request: Request, service: Served) -> Response:
    """Answer in a conversation."""
    service.require(body.model)
    if service.renderer is None:
        raise RefusedError(
            400,
            "the model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    messages = [message.for_template() for message in body.messages]
    left = record_of(request.scope).started + service.limits.deadline_seconds - time.monotonic()
    try:
        async with asyncio.timeout(left):
            text = await unless_gone(request, service.renderer.render(messages))
    except TimeoutError as error:
        raise too_late("the conversation was not written down in time") from error
    prompt = await asyncio.to_thread(lambda: tuple(service.tokenizer.encode(text, framed=False)))
    _note_prompts(request, service, messages)
    return await _respond(request, service, body, [prompt], _ChatForm(service.tokenizer, body))


def _model(service: Service) -> schemas.Model:
    return schemas.Model(
        id=service.name, created=service.started, max_model_len=service.engine.max_sequence
    )


def _note_prompts(request: Request, service: Service, prompts: Sequence[object]) -> None:
    if service.log_prompts:
        record_of(request.scope).fields["prompts"] = prompts


async def _respond(
    request: Request,
    service: Service,
    body: schemas.CompletionRequest | schemas.ChatRequest,
    prompts: Sequence[Prompt],
    form: "_Form",
) -> Response:
    record = record_of(request.scope)
    head = {
        "id": f"{form.prefix}-{record.request_id}",
        "created": int(time.time()),
        "model": service.name,
    }
    with ExitStack() as stack:
        answers = stack.enter_context(
            service.answer(
                prompts,
                copies=body.n or 1,
                new_tokens=body.new_tokens,
                usual_tokens=body.usual_tokens,
                sampling=body.sampling(),
                stop=body.stops,
                alternatives=body.alternatives,
                ignore_eos=bool(body.ignore_eos),
                arrived=record.started,
            )
        )
        stack.callback(lambda: record.fields.update(_usage(answers)))
        if body.stream:
            pieces = answers.pieces()
            first = await unless_gone(request, anext(pieces))
            events = _events(
                service, record, form, head, answers, first, pieces, usage=body.include_usage
            )
            return _EventStream(events, stack.pop_all())
        whole = await unless_gone(request, answers.whole())
        if service.log_prompts:
            record.fields["answers"] = [piece.text for piece in whole]
        # Log probabilities make it long, and nobody else is to wait for it.
        content = await asyncio.to_thread(
            lambda: form.document(head, whole, _usage(answers)).model_dump_json()
        )
        return Response(content, media_type="application/json")


class _EventStream(StreamingResponse):
    """Server-sent events; when the last one is sent, or the client is gone, all is given back."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], held: ExitStack) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _events(
    service: Service,
    record: Record,
    form: "_Form",
    head: dict[str, Any],
    answers: Answers,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    *,
    usage: bool,
) -> AsyncGenerator[str, None]:
    texts: defaultdict[int, str] = defaultdict(str)

    def event(piece: Piece) -> str:
        chunk = form.chunk(head, piece, len(texts[piece.index]))
        texts[piece.index] += piece.text
        return _event(chunk)

    try:
        yield event(first)
        async for piece in pieces:
            yield event(piece)
        if usage:
            yield _event(form.last_chunk(head, _usage(answers)))
    except RefusedError as refused:
        refused.note(record)
        yield _event(refused.body)
    finally:
        if service.log_prompts:
            record.fields["answers"] = [texts[index] for index in sorted(texts)]
    yield "data: [DONE]\n\n"


def _event(value: BaseModel) -> str:
    return f"data: {value.model_dump_json(exclude_unset=True)}\n\n"


def _usage(answers: Answers) -> schemas.Usage:
    return schemas.Usage(
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=answers.completion_tokens,
        total_tokens=answers.prompt_tokens + answers.completion_tokens,
    )


class _Form(Protocol):
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


class _CompletionForm:
    """See `_Form`."""

    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, body: schemas.CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.Completion:
        return self._completion(head, [self._choice(piece, 0) for piece in pieces], usage=usage)

    def chunk(self, head: dict[str, Any], piece: Piece, start: int) -> schemas.Completion:
        return self._completion(head, [self._choice(piece, start)])

    def last_chunk(self, head: dict[str, Any], usage: schemas.Usage) -> schemas.Completion:
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
            tokens=[_name(self._tokenizer, token.id) for token in piece.tokens],
            token_logprobs=[_finite(token.logprob) for token in piece.tokens],
            top_logprobs=[
                {_name(self._tokenizer, id_): _finite(value) for id_, value in token.alternatives}
                for token in piece.tokens
            ],
            text_offset=offsets,
        )


class _ChatForm:
    """See `_Form`."""

    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, body: schemas.ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._wanted = body.alternatives is not None

    def document(
        self, head: dict[str, Any], pieces: Sequence[Piece], usage: schemas.Usage
    ) -> schemas.ChatCompletion:
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
        text = self._tokenizer.text_of(token)
        return {
            "token": _name(self._tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": None if text is None else list(text.encode()),
        }


def _name(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.text_of(token)
    return f"token_id:{token}" if text is None else text


def _finite(logprob: float | None) -> float:
    """A log probability that JSON can hold: OpenAI, too, has -9999 for the impossible."""
    assert logprob is not None
    return max(logprob, _IMPOSSIBLE)
