"""The chat template of a bundle, and conversations that wait to be written by it.

One is rendered at a time, in the process of `rendering`; those that wait do not hold a thread.
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

# Around the number of a special token that is to be text; Unicode assigns no character to it.
_MARK = "\ufdd2"


T = TypeVar("T")


class Renderer:
    """Renders the chat template of a model, in a process of its own.

    Attributes:
        takes_tools: see `ChatTemplate`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        """Prepare; the process is started with the first conversation."""
        self.takes_tools = template.takes_tools
        self._rendering = rendering.Rendering(template)
        self._worker = ThreadPoolExecutor(1, "template")
        self._closed = False
        self._until = math.inf  # on the clock `time.monotonic`

    async def render(self, conversation: Conversation) -> str:
        """The prompt.

        Raises:
            UsageError: the template does not take such messages, or not within its limits.
            Busy: the server is closing.
        """
        return await asyncio.wrap_future(self._worker.submit(self._render, conversation))

    def hurry(self) -> None:
        """Let what waits be rendered, but not for longer than one conversation may take."""
        self._until = time.monotonic() + rendering.SECONDS

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        self._rendering.close()
        self._worker.shutdown(cancel_futures=True)
        self._rendering.close()  # it may have been started again

    def _render(self, conversation: Conversation) -> str:
        left = self._until - time.monotonic()
        if self._closed or left <= 0:
            raise Busy("the server is closing", fix="send the request to another server")
        return self._rendering.render(conversation, min(rendering.SECONDS, left))


def as_text(value: T, specials: Sequence[str]) -> T:
    """A conversation's part in which special tokens cannot be taken for those of the template.

    Args:
        value: text, or what JSON makes of texts.
        specials: texts that stand for special tokens.

    Returns:
        the same with marks in their places, for `encode`.
    """
    if not specials:
        return value
    numbers = {special: number for number, special in enumerate(specials)}
    # Of those that begin alike, the longest counts.
    any_of = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))

    def mark(part: Any) -> Any:
        match part:
            case str():
                plain = part.replace(_MARK, "")  # what looks like a mark is none
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
    """The ids of a conversation that was written down, with `as_text`'s marks in it or not."""
    ids: list[int] = []
    for place, part in enumerate(text.split(_MARK)):
        if place % 2:
            ids += tokenizer.encode_literally(tokenizer.specials[int(part)])
        elif part:
            ids += tokenizer.encode(part, framed=False)
    return ids


def open_chat_template(bundle: Path, *, verify: bool = True) -> ChatTemplate | None:
    """The chat template of a bundle; None if its tokenizer has none.

    Args:
        bundle: its folder.
        verify: compare the files with the hashes in the manifest first.

    Raises:
        InputError: it is not readable.
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
