"""The chat template of a bundle, and the queue of conversations to render with it.

One conversation is rendered at a time, in the process of `rendering`; waiting conversations do not
hold a thread.
"""

import asyncio
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from runtime.batching import Busy
from runtime.server import rendering
from runtime.server.templates import ChatTemplate, Conversation
from runtime.text import Tokenizer, verify_texts
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, boundary
from thanos_deploy.model import tokenizer_files

# Put around the number of a special token that is to be plain text; a noncharacter of Unicode.
_MARK = "\ufdd2"


T = TypeVar("T")


class Renderer:
    """Renders the chat template of a model, in a process of its own.

    Attributes:
        takes_tools: see `ChatTemplate`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        """Prepare; the process starts with the first conversation."""
        self.takes_tools = template.takes_tools
        self._rendering = rendering.Rendering(template)
        self._worker = ThreadPoolExecutor(1, "template")
        self._closed = False
        self._until = math.inf  # on the clock `time.monotonic`

    async def render(self, conversation: Conversation) -> str:
        """Return the prompt of a conversation.

        Raises:
            UsageError: the template does not accept these messages, or exceeds its limits.
            Busy: the server is closing.
        """
        return await asyncio.wrap_future(self._worker.submit(self._render, conversation))

    def hurry(self) -> None:
        """Give all waiting conversations together no more time than one may take, for shutdown."""
        self._until = time.monotonic() + rendering.SECONDS

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        self._closed = True
        self._rendering.close()
        self._worker.shutdown(cancel_futures=True)
        self._rendering.close()  # a conversation may have started it again

    def _render(self, conversation: Conversation) -> str:
        left = self._until - time.monotonic()
        if self._closed or left <= 0:
            raise Busy("the server is closing", fix="send the request to another server")
        return self._rendering.render(conversation, min(rendering.SECONDS, left))


def as_text(value: T, specials: Sequence[str]) -> T:
    """Replace special tokens in a part of a conversation by marks, so that they stay plain text.

    Otherwise they could not be told from the special tokens that the template writes.

    Args:
        value: a text, or a JSON value that contains texts.
        specials: the texts of the special tokens.

    Returns:
        the value with marks in place of special tokens, for `encode`.
    """
    if not specials:
        return value
    numbers = {special: number for number, special in enumerate(specials)}
    # Longest first: if one is the beginning of another, the longer one counts.
    any_of = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))

    def mark(part: Any) -> Any:
        match part:
            case str():
                plain = part.replace(_MARK, "")  # the input may not contain marks
                return any_of.sub(lambda found: f"{_MARK}{numbers[found[0]]}{_MARK}", plain)
            case dict():
                return {key: mark(inner) for key, inner in part.items()}
            case list():
                return [mark(inner) for inner in part]
            case _:
                return part

    marked: T = mark(value)
    return marked


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a rendered conversation, which may contain the marks of `as_text`."""
    ids: list[int] = []
    for place, part in enumerate(text.split(_MARK)):
        if place % 2:
            ids += tokenizer.encode_literally(tokenizer.specials[int(part)])
        elif part:
            ids += tokenizer.encode(part, framed=False)
    return ids


def open_chat_template(bundle: Path, *, verify: bool = True) -> ChatTemplate | None:
    """Open the chat template of a bundle; return None if its tokenizer has none.

    Args:
        bundle: its folder.
        verify: compare the files with the hashes in the manifest first.

    Raises:
        InputError: the template is not readable.
        IntegrityError: a file was changed.
    """
    opened = Bundle.open(bundle)
    if verify:
        verify_texts(opened, templates=True)
    model = bundle / "model"
    with boundary(
        InputError,
        f"{model}: not a readable chat template",
        fix="repair it in the model that the bundle was made from, and make the bundle again",
    ):
        source = tokenizer_files.chat_template(model)
        return (
            None if source is None else ChatTemplate(source, tokenizer_files.special_tokens(model))
        )
