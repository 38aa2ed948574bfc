"""Text in, text out: the tokenizer of a bundle, and a stream that ends at stop strings.

The tokenizer is the model's; see `thanos_deploy.model.tokenizer_files`.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.engine import Engine, stop_ids
from runtime.generate import generate
from runtime.sampling import GREEDY, Sampling
from thanos_deploy.bundle.layout import MODEL, TOKENIZER
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, PlatformError, UsageError, boundary
from thanos_deploy.model import tokenizer_files

# Ids before the first one that it is decoded with.
_CONTEXT = 8

# Ids that are held back for a character to be finished, which has at most four bytes.
_HELD = 16


class Tokenizer:
    """A tokenizer, and the ids that end a text.

    Attributes:
        stop: ids that end a text.
        specials: texts that stand for special tokens.
    """

    def __init__(self, tokenizer: Any, stop: frozenset[int]) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            stop: ids that end a text.
        """
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}
        self.stop = stop
        self.specials = tuple(
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        )

    def encode(self, text: str, *, framed: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: what to encode.
            framed: with what the model wants before and after a text; a chat template writes that
                itself.

        Raises:
            InputError: the text is not valid Unicode, or has what the tokenizer has no token for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has invalid UTF-8 at character {error.start}",
                fix="give the text in UTF-8",
            ) from error
        with boundary(
            InputError,
            "the tokenizer cannot encode the text",
            fix="restore tokenizer.json from the model's origin, or give another text",
        ):
            return _encoded(self._tokenizer, text, framed=framed)

    def encode_literally(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are text like any other."""
        return _encoded(self._literal, text, framed=False)

    @cached_property
    def _literal(self) -> Any:
        # Another one, because what it makes of special tokens is a property of a tokenizer.
        other = copy.deepcopy(self._tokenizer)
        other.encode_special_tokens = True
        return other

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """The text of ids, with or without special tokens."""
        # As a batch of one, which leaves Python to other threads meanwhile; see `_encoded`.
        (text,) = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=not specials)
        return str(text)

    @property
    def size(self) -> int:
        """How many ids it knows."""
        known: int = self._tokenizer.get_vocab_size()
        return known

    def serialized(self) -> str:
        """All of it, as JSON that other libraries read."""
        content: str = self._tokenizer.to_str()
        return content

    def text_of(self, token: int) -> str | None:
        """The text of one id within a longer text; None if it is only part of a character."""
        if token not in self._texts:  # each is decoded once: alternatives name many of them
            # Beside itself, because some tokenizers drop the space before the first word.
            once, twice = (
                self._tokenizer.decode([token] * times, skip_special_tokens=False)
                for times in (1, 2)
            )
            text = twice[len(once) :]
            self._texts[token] = None if "\ufffd" in text else text
        return self._texts[token]

    def name_of(self, token: int) -> str:
        """Its text, or "token_id:NUMBER" where it is none by itself."""
        text = self.text_of(token)
        return f"token_id:{token}" if text is None else text


def _encoded(tokenizer: Any, text: str, *, framed: bool) -> list[int]:
    """The ids of a text, without stopping the other threads of this process meanwhile.

    `Tokenizer.encode` keeps Python's lock, for seconds where a text has a megabyte;
    `Tokenizer.encode_batch` gives it back.
    """
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=framed)
    ids: list[int] = encoding.ids
    return ids


def open_tokenizer(bundle: Path, *, verify: bool = True) -> Tokenizer:
    """Load the tokenizer of a bundle.

    Args:
        bundle: its folder.
        verify: compare its files with the hashes in the manifest first.

    Raises:
        PlatformError: the package tokenizers is not installed.
        InputError: the bundle has no tokenizer.json, or its files are not readable.
        IntegrityError: a file was changed.
    """
    opened = Bundle.open(bundle)
    if verify:
        opened.verify_file(TOKENIZER)
        verify_texts(opened)
    try:
        return Tokenizer(tokenizer_files.load(bundle / MODEL), stop_ids(bundle / MODEL))
    except ImportError as error:
        raise PlatformError(
            "the package tokenizers is not installed", fix="pip install tokenizers"
        ) from error
    # The package raises plain Exception.
    except Exception as error:
        raise InputError(
            f"{bundle / TOKENIZER}: not a readable tokenizer ({error})",
            fix="save the model's tokenizer as tokenizer.json before pruning it",
        ) from error


def verify_texts(bundle: Bundle, *, templates: bool = False) -> None:
    """Compare what says how texts become ids, and where they end, with the manifest.

    Args:
        bundle: the bundle.
        templates: the chat templates, too.

    Raises:
        IntegrityError: a file was changed, is missing, or is one that no stage wrote.
    """

    def is_read(name: str) -> bool:
        folder, _, file = name.partition("/")
        return folder == MODEL and (
            file in (*tokenizer_files.TOKENS, "config.json", "generation_config.json")
            or (templates and tokenizer_files.is_template(file))
        )

    for name in [name for stage in bundle.stages.values() for name in stage.files]:
        if is_read(name):
            bundle.verify_file(name)
    bundle.refuse(filter(is_read, bundle.unrecorded(MODEL)))


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
    require_text(prompt, *stop)
    given = tokenizer.encode(prompt)
    ids = generate(engine, given, new_tokens=new_tokens, stop=tokenizer.stop, sampling=sampling)
    yield from until(pieces(tokenizer, ids, given), stop)


def require_text(*texts: str) -> None:
    """Refuse a prompt or a stop string without a character.

    Raises:
        UsageError: one is empty.
    """
    if not all(texts):
        raise UsageError(
            "a prompt or stop string is empty", fix="give at least one character of text"
        )


def pieces(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text of a stream of ids, in pieces without half characters; see `Decoder`."""
    decoder = Decoder(tokenizer, before)
    for token in ids:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.finish():
        yield rest


def until(texts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on as far as the first stop string, and none of that; see `StopStrings`."""
    strings = StopStrings(stop)
    for text in texts:
        if piece := strings.push(text):
            yield piece
        if strings.found:
            return
    if rest := strings.finish():
        yield rest


class Decoder:
    """Makes text of ids that come one by one, and holds half characters back."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """Start.

        Args:
            tokenizer: decodes the ids.
            before: ids just before them, such as the prompt's. Some tokenizers drop the space
                before the first word that they decode, so nothing is decoded without the piece
                before it.
        """
        self._tokenizer = tokenizer
        self._before = list(before[-_CONTEXT:])
        self._fresh: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with one more id; it may be empty."""
        self._fresh.append(token)
        text = self._text(self._fresh)
        if not text or text.endswith("\ufffd"):
            return self._part(text) if len(self._fresh) > _HELD else ""
        self._before, self._fresh = self._fresh, []
        return text

    def _part(self, text: str) -> str:
        """What is given out of a text that has not come to the end of a character for long.

        The last of its characters may still be finished; all before it stay what they are.
        """
        for cut in range(1, 5):  # ids that the last character has so far
            before, fresh = self._fresh[:-cut], self._fresh[-cut:]
            certain = self._text(before)
            if certain + "\ufffd" == text:
                self._before, self._fresh = before[-_CONTEXT:], fresh
                return certain
        self._before, self._fresh = self._fresh[-_CONTEXT:], []
        return text

    def finish(self) -> str:
        """The text of what was held back, at the end of the ids."""
        return self._text(self._fresh)

    def _text(self, fresh: Sequence[int]) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *fresh])[len(known) :]


class StopStrings:
    """Passes text on as far as the first stop string, and holds back what may begin one.

    The first is the one that ends first, and of those that end together the longest. However long
    the strings are, a character costs the same (Knuth, Morris and Pratt, 1977).

    Attributes:
        found: there was one, so nothing that comes later counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for any of these strings, none of them empty."""
        self._stop = [_Search(end) for end in stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be passed on with some more text; it may be empty."""
        begin = len(self._held)
        self._held += text
        for place, character in enumerate(text, begin + 1):
            ended = [search.length for search in self._stop if search.push(character)]
            if ended:
                self.found = True
                return self._release(place - max(ended))
        doubtful = max((search.matched for search in self._stop), default=0)
        return self._release(len(self._held) - doubtful)

    def finish(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        passed, self._held = self._held[:length], self._held[length:]
        return passed


class _Search:
    """Looks for one string in a text that comes character by character.

    Attributes:
        length: of the string.
        matched: characters with which the string begins and the text, so far, ends.
    """

    def __init__(self, wanted: str) -> None:
        self.length = len(wanted)
        self.matched = 0
        self._wanted = wanted
        # Of every beginning of the string that was seen so far: the longest shorter beginning with
        # which it ends.
        self._borders: list[int] = []

    def push(self, character: str) -> bool:
        """The text ends with the string now."""
        if self.matched == self.length:
            self.matched = self._borders[-1]
        self.matched = self._longer(self.matched, character)
        if self.matched > len(self._borders):
            border = self._longer(self._borders[-1], character) if self._borders else 0
            self._borders.append(border)
        return self.matched == self.length

    def _longer(self, matched: int, character: str) -> int:
        """The characters that match with one more, of a text where so many did."""
        while matched and self._wanted[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._wanted[matched] == character)
