"""Turn the body of a request into the ids of its prompt; the routes /tokenize and /detokenize.

These routes are vLLM's.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Discriminator, Tag
from starlette.requests import Request

from runtime.server import bodies
from runtime.server.chat import as_text, encode
from runtime.server.clients import unless_gone
from runtime.server.errors import ErrorBody, RefusedError, too_late
from runtime.server.logs import record_of
from runtime.server.service import Prompt, Served, Service
from runtime.server.templates import Conversation
from runtime.server.tools import offered

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}}
router = APIRouter(responses=_ERRORS, tags=["Tokens"])


class Tokens(BaseModel):
    """The response of /tokenize: the ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The response of /detokenize: the text of ids."""

    prompt: str


def _kind(body: Any) -> str:
    given = body if isinstance(body, dict) else {}
    return "conversation" if "messages" in given else "text"


@router.post("/tokenize")
async def tokenize(
    body: Annotated[
        Annotated[bodies.TokenizeText, Tag("text")]
        | Annotated[bodies.TokenizeConversation, Tag("conversation")],
        Discriminator(_kind),
    ],
    request: Request,
    service: Served,
) -> Tokens:
    """Return the ids of a text, or of a conversation as the chat template renders it."""
    if body.model is not None:
        service.require(body.model)
    if isinstance(body, bodies.TokenizeConversation):
        ids = await prompt_of(request, service, body)
    else:
        text, framed = body.prompt, body.add_special_tokens is not False
        ids = await asyncio.to_thread(lambda: tuple(service.tokenizer.encode(text, framed=framed)))
    return Tokens(
        count=len(ids),
        max_model_len=service.engine.max_sequence,
        tokens=list(ids),
        token_strs=await asyncio.to_thread(lambda: list(map(service.tokenizer.name_of, ids)))
        if body.return_token_strs
        else None,
    )


@router.post("/detokenize")
async def detokenize(body: bodies.Detokenize, service: Served) -> Detokenized:
    """Return the text of ids, special tokens included."""
    if body.model is not None:
        service.require(body.model)
    service.require_ids(body.tokens, "tokens")
    decode = service.tokenizer.decode
    return Detokenized(prompt=await asyncio.to_thread(decode, body.tokens, specials=True))


async def prompt_of(request: Request, service: Service, body: bodies.Chat) -> Prompt:
    """Return the ids of a conversation, rendered by the chat template.

    Raises:
        RefusedError: the model has no chat template, or rendering missed the deadline.
        UsageError: the template does not accept the conversation.
    """
    if service.renderer is None:
        raise RefusedError(
            400,
            "the model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    tokenizer, renderer = service.tokenizer, service.renderer

    def told() -> Conversation:
        conversation = offered(body.conversation(), body.offers, native=renderer.takes_tools)
        if body.allow_special_tokens:
            return conversation
        return replace(
            conversation,
            messages=as_text(conversation.messages, tokenizer.specials),
            tools=as_text(conversation.tools, tokenizer.specials),
        )

    async with before_the_deadline(
        request, service, "the chat template was not rendered before the deadline"
    ):
        conversation = await asyncio.to_thread(told)
        text = await unless_gone(request, renderer.render(conversation))
    return await asyncio.to_thread(lambda: tuple(encode(tokenizer, text)))


@asynccontextmanager
async def before_the_deadline(
    request: Request, service: Service, late: str
) -> AsyncGenerator[None, None]:
    """Cancel what runs in this context at the deadline of a request.

    Args:
        request: the request.
        service: the service, whose limits set the deadline.
        late: message of the error.

    Raises:
        RefusedError: the deadline came before the end of the context.
    """
    left = record_of(request.scope).started + service.limits.deadline_seconds - time.monotonic()
    try:
        async with asyncio.timeout(left):
            yield
    except TimeoutError as error:
        raise too_late(late) from error


def note_prompts(
    request: Request, service: Service, prompts: Callable[[], Sequence[object]]
) -> None:
    """Add the prompts to the log line of a request, if the operator allows it."""
    if service.log_prompts:
        record_of(request.scope).fields["prompts"] = prompts()
