"""OpenAI's routes for text: completions and chat, whole or as server-sent events.

A stream begins when the first piece of text is there, so that until then a request can still be
refused with a status. Later errors are an event with the error object; [DONE] follows either way.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.batching import Token
from runtime.grammars import Grammar
from runtime.server import bodies, schemas
from runtime.server.answers import Answers, Piece
from runtime.server.clients import require_present, unless_gone
from runtime.server.errors import ErrorBody, RefusedError
from runtime.server.logs import Record, record_of
from runtime.server.prompts import before_the_deadline, note_prompts, prompt_of
from runtime.server.responses import ChatResponses, CompletionResponses, Responses
from runtime.server.service import Prompt, Served, Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    503: {"model": ErrorBody, "description": "The server is busy; see Retry-After"},
    504: {"model": ErrorBody, "description": "The answer was not finished before the deadline"},
}

# A piece with more tokens than this is serialised on another thread than the event loop's.
_MANY = 64

router = APIRouter(prefix="/v1", responses=_ERRORS, tags=["OpenAI"])


@router.get("/models")
async def models(service: Served) -> schemas.Models:
    """List the models that are served: one, under each of its names."""
    return schemas.Models(data=[_model(service, name) for name in service.names])


@router.get("/models/{model:path}")
async def model(model: str, service: Served) -> schemas.Model:
    """Describe a model."""
    service.require(model)
    return _model(service, model)


@router.post("/completions", response_model=schemas.Completion)
async def completions(
    body: bodies.CompletionRequest, request: Request, service: Served
) -> Response:
    """Continue one or more prompts."""
    service.require(body.model)
    framed = body.add_special_tokens is not False
    prompts = await asyncio.to_thread(
        lambda: [
            tuple(
                service.tokenizer.encode(prompt, framed=framed)
                if isinstance(prompt, str)
                else prompt
            )
            for prompt in body.prompts
        ]
    )
    note_prompts(request, service, lambda: body.prompts)
    options = body.answer_options()
    echoed: list[list[Token]] = []
    if options.echo:
        service.require_prompts(prompts, options)
        echoed = await _echoed(request, service, prompts, options.alternatives)
    responses = CompletionResponses(service.tokenizer, body)
    return await _respond(request, service, body, prompts, responses, echoed=echoed)


@router.post("/chat/completions", response_model=schemas.ChatCompletion)
async def chat(body: bodies.ChatRequest, request: Request, service: Served) -> Response:
    """Continue a conversation."""
    service.require(body.model)
    prompt = await prompt_of(request, service, body)
    note_prompts(request, service, lambda: [message.for_template() for message in body.messages])
    return await _respond(request, service, body, [prompt], ChatResponses(service.tokenizer, body))


async def _grammar(request: Request, service: Service, body: bodies.Generation) -> Grammar | None:
    """Compile the grammar that the answers must follow; None for any text."""
    if (written := body.grammar()) is None:
        return None
    async with before_the_deadline(
        request, service, "the form of the answer was not compiled before the deadline"
    ):
        return await unless_gone(request, service.compiler.compile(written))


def _model(service: Service, name: str) -> schemas.Model:
    return schemas.Model(
        id=name, created=service.started, max_model_len=service.engine.max_sequence
    )


async def _echoed(
    request: Request, service: Service, prompts: Sequence[Prompt], alternatives: int | None
) -> list[list[Token]]:
    """Return the tokens of prompts, with log probabilities if these are asked for."""
    if alternatives is None:
        return [[Token(token, None) for token in prompt] for prompt in prompts]
    async with before_the_deadline(request, service, "the prompt was not read before the deadline"):
        return await unless_gone(request, service.forward.score(prompts, alternatives))


async def _respond(
    request: Request,
    service: Service,
    body: bodies.CompletionRequest | bodies.ChatRequest,
    prompts: Sequence[Prompt],
    responses: Responses,
    *,
    echoed: Sequence[Sequence[Token]] = (),
) -> Response:
    record = record_of(request.scope)
    grammar = await _grammar(request, service, body)
    head = {
        "id": f"{responses.prefix}-{record.request_id}",
        "created": int(time.time()),
        "model": body.model,
    }
    # A client that has left must not take a slot that others wait for.
    await require_present(request)
    with ExitStack() as stack:
        answers = stack.enter_context(
            service.answer(
                prompts,
                body.answer_options(),
                arrived=record.started,
                echoed=echoed,
                grammar=grammar,
            )
        )
        stack.callback(lambda: record.fields.update(_usage(answers)))
        if body.stream:
            pieces = answers.pieces()
            first = await unless_gone(request, anext(pieces))
            events = _events(
                service, record, responses, head, answers, first, pieces, usage=body.include_usage
            )
            return _EventStream(events, stack.pop_all())
        whole = await unless_gone(request, answers.whole())
        if service.log_prompts:
            record.fields["answers"] = [piece.text for piece in whole]
        # Log probabilities make it long, and it must not block the event loop.
        content = await asyncio.to_thread(
            lambda: responses.document(head, whole, _usage(answers)).model_dump_json()
        )
        return Response(content, media_type="application/json")


class _EventStream(StreamingResponse):
    """Server-sent events; closes `held` when the last one is sent, or the client has left."""

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
    responses: Responses,
    head: dict[str, Any],
    answers: Answers,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    *,
    usage: bool,
) -> AsyncGenerator[str, None]:
    texts: defaultdict[int, str] = defaultdict(str)

    def event(piece: Piece) -> str:
        chunk = responses.chunk(head, piece, len(texts[piece.index]))
        texts[piece.index] += piece.text
        return _event(chunk)

    async def written(piece: Piece) -> str:
        # Text that was held back for long, or a prompt, may have thousands of log probabilities.
        many = len(piece.tokens) > _MANY
        return await asyncio.to_thread(event, piece) if many else event(piece)

    try:
        yield await written(first)
        async for piece in pieces:
            yield await written(piece)
        if usage:
            yield _event(responses.last_chunk(head, _usage(answers)))
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
