"""Text in, text out: the tokenizer of a bundle, and a stream that ends at stop strings.

Reads `model/tokenizer.json` with the package tokenizers, which needs no torch and no transformers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.engine import Engine, stop_ids
from runtime.generate import generate
from runtime.sampling import GREEDY, Sampling
from thanos_deploy.artifact import Bundle
from thanos_deploy.errors import InputError, PlatformError, UsageError

_TOKENIZER = "model/tokenizer.json"

# Ids of the prompt that the first piece is decoded with.
_CONTEXT = 8


class Tokenizer:
    """A tokenizer, and the ids that end a text."""

    def __init__(self, tokenizer: Any, stop: frozenset[int]) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            stop: ids that end a text.
        """
        self._tokenizer = tokenizer
        self.stop = stop

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the model wants before it.

        Raises:
            InputError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has invalid UTF-8 at character {error.start}",
                fix="give the text in UTF-8",
            ) from error
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def open_tokenizer(bundle: Path, *, verify: bool = True) -> Tokenizer:
    """Load the tokenizer of a bundle.

    Args:
        bundle: its folder.
        verify: compare its files with the hashes in the manifest first.

    Raises:
        PlatformError: the package tokenizers is not installed.
        InputError: the bundle has no tokenizer.json, or it is not readable.
        IntegrityError: a file was changed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise PlatformError(
            "the package tokenizers is not installed", fix="pip install tokenizers"
        ) from error
    opened = Bundle.open(bundle)
    path = bundle / _TOKENIZER
    if verify:
        opened.verify_file(_TOKENIZER)
        for name in ("model/config.json", "model/generation_config.json"):
            if any(name in record.files for record in opened.stages.values()):
                opened.verify_file(name)
    try:
        return Tokenizer(
            tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")),
            stop_ids(bundle / "model"),
        )
    # The package raises plain Exception.
    except Exception as error:
        raise InputError(
            f"{path}: not a readable tokenizer ({error})",
            fix="save the model's tokenizer as tokenizer.json before pruning it",
        ) from error


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue a prompt.

    Args:
        engine: what to run.
        tokenizer: of the same bundle.
        prompt: the text to continue.
        new_tokens: the most tokens to generate.
        sampling: how to choose them.
        stop: texts that end the answer; they are not yielded.

    Yields:
        pieces of text, each as soon as it is certain: a character is held back until all its
        bytes are there, and what may be the beginning of a stop string until it is not.

    Raises:
        UsageError: the prompt or a stop string is empty.
        InputError: the prompt is not valid Unicode.
    """
    if not prompt or not all(stop):
        raise UsageError(
            "an empty prompt or stop string", fix="give at least one character of text"
        )
    given = tokenizer.encode(prompt)
    ids = generate(engine, given, new_tokens=new_tokens, stop=tokenizer.stop, sampling=sampling)
    yield from until(pieces(tokenizer, ids, given[-_CONTEXT:]), stop)


def pieces(tokenizer: Tokenizer, ids: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text of a stream of ids, in pieces without half characters.

    Args:
        tokenizer: decodes them.
        ids: the stream.
        before: ids just before them. Some tokenizers drop the space before the first word that
            they decode, so nothing is decoded without the piece before it.
    """
    before = list(before)
    fresh: list[int] = []
    for token in ids:
        fresh.append(token)
        known = tokenizer.decode(before)
        text = tokenizer.decode(before + fresh)
        if len(text) > len(known) and not text.endswith("\ufffd"):
            yield text[len(known) :]
            before, fresh = fresh, []
    if fresh:
        yield tokenizer.decode(before + fresh)[len(tokenizer.decode(before)) :]


def until(texts: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on as far as the first stop string, and none of that."""
    held = ""
    for text in texts:
        held += text
        found = [place for end in stop if (place := held.find(end)) >= 0]
        if found:
            held = held[: min(found)]
            break
        keep = max(
            (
                length
                for end in stop
                for length in range(1, min(len(end), len(held) + 1))
                if held.endswith(end[:length])
            ),
            default=0,
        )
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
