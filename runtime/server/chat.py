"""The chat template of a bundle, rendered where it can do no harm.

A template is a program that came with the model. Its sandbox keeps it from everything but time and
memory, so it runs in a process of its own, which is killed when it takes too long and started again
for the next conversation. One is rendered at a time; those that wait do not hold a thread.
"""

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from runtime.batching import Busy
from runtime.server.templates import ChatTemplate, Conversation
from runtime.text import Tokenizer, verify_texts
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.model import tokenizer_files

# A long conversation takes milliseconds and a megabyte.
_SECONDS, _START_SECONDS = 5.0, 60.0
_CHARACTERS = 16 << 20
_MEMORY_BYTES = 1 << 30

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
        self._first = {"source": template.source, "tokens": template.tokens}
        self.takes_tools = template.takes_tools
        self._worker = ThreadPoolExecutor(1, "template")
        self._process: subprocess.Popen[bytes] | None = None
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
        self._until = time.monotonic() + _SECONDS

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        self._kill()
        self._worker.shutdown(cancel_futures=True)
        self._kill()

    def _render(self, conversation: Conversation) -> str:
        if (left := self._until - time.monotonic()) <= 0:
            raise Busy("the server is closing", fix="send the request to another server")
        process = self._process or self._start()
        said = _ask(process, asdict(conversation), min(_SECONDS, left))
        if said is None:
            self._kill()
            raise UsageError(
                f"the model's chat template did not finish within {_SECONDS:g} s, or its process "
                "broke down",
                fix="send shorter messages, or use /v1/completions",
            )
        if "refused" in said:
            raise UsageError(
                str(said["refused"]),
                fix="send the roles, and the order of them, that the model was trained with",
            )
        return str(said["prompt"])

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._closed:
            raise Busy("the server is closing", fix="send the request to another server")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # nothing is imported from the folder that the server was started in
                "-m",
                "runtime.server.templates",
                str(_CHARACTERS),
                str(_MEMORY_BYTES),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # A busy machine takes a moment to start it, which no conversation is charged with.
        if _ask(self._process, self._first, _START_SECONDS) is None:
            self._kill()
            raise RuntimeError("the process for the chat template did not start")
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


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
    try:
        source = tokenizer_files.chat_template(model)
        return (
            None if source is None else ChatTemplate(source, tokenizer_files.special_tokens(model))
        )
    except (ValueError, TypeError, AttributeError, KeyError, jinja2.TemplateError) as error:
        raise InputError(
            f"{model}: not a readable chat template ({type(error).__name__}: {error})",
            fix="repair it in the model that the bundle was made from, and make the bundle again",
        ) from error


def _ask(
    process: "subprocess.Popen[bytes]", value: object, seconds: float
) -> dict[str, object] | None:
    """What it says; None if it broke down or was killed, which it is after that time."""
    assert process.stdin
    assert process.stdout
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(value).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (BrokenPipeError, ValueError):  # a closed pipe
        return None
    finally:
        timer.cancel()
    said: dict[str, object] | None = json.loads(line) if line.endswith(b"\n") else None
    return said
