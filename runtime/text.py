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

# Number of ids before new ones that are decoded with them.
_CONTEXT = 8

# Number of ids that may be held back for an unfinished character, which has at most four bytes.
_HELD = 16


class Tokenizer:
    """A tokenizer, and the ids that end a text.

    Attributes:
        stop: ids that end a text.
        specials: the texts of the special tokens.
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
        """Return the ids of a text.

        Args:
            text: the text to encode.
            framed: add the special tokens that the model expects before and after a text; a chat
                template writes them itself.

        Raises:
            InputError: the text is not valid Unicode, or the tokenizer cannot encode it.
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
        """Return the ids of a text in which the texts of special tokens are ordinary text."""
        return _encoded(self._literal, text, framed=False)

    @cached_property
    def _literal(self) -> Any:
        # A second tokenizer, because this setting holds for a whole tokenizer.
        other = copy.deepcopy(self._tokenizer)
        other.encode_special_tokens = True
        return other

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Return the text of ids, with or without special tokens."""
        # As a batch of one, because `decode_batch` releases the GIL; see `_encoded`.
        (text,) = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=not specials)
        return str(text)

    @property
    def size(self) -> int:
        """Number of ids in its vocabulary."""
        known: int = self._tokenizer.get_vocab_size()
        return known

    def serialized(self) -> str:
        """Return the whole tokenizer as JSON that other libraries read."""
        content: str = self._tokenizer.to_str()
        return content

    def text_of(self, token: int) -> str | None:
        """Return the text of one id within a longer text; None if it is part of a character."""
        if token not in self._texts:  # cached, because log probabilities name many tokens
            # Decoded after itself, because some tokenizers drop the space before the first word.
            once, twice = (
                self._tokenizer.decode([token] * times, skip_special_tokens=False)
                for times in (1, 2)
            )
            text = twice[len(once) :]
            self._texts[token] = None if "\ufffd" in text else text
        return self._texts[token]

    def name_of(self, token: int) -> str:
        """Return the text of one id, or "token_id:NUMBER" if it has no text by itself."""
        text = self.text_of(token)
        return f"token_id:{token}" if text is None else text


def _encoded(tokenizer: Any, text: str, *, framed: bool) -> list[int]:
    """Return the ids of a text, and let other threads run meanwhile.

    `Tokenizer.encode` of the package tokenizers holds the GIL, for seconds if the text has a
    megabyte; `encode_batch` releases it.
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
    stop = stop_ids(bundle / MODEL)
    try:
        return Tokenizer(tokenizer_files.load(bundle / MODEL), stop)
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
    """Compare the files that decide how texts become ids, and where they end, with the manifest.

    Args:
        bundle: the bundle.
        templates: compare the chat templates, too.

    Raises:
        IntegrityError: a file was changed, is missing, or was not written by any stage.
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
    """Continue a prompt, and yield the text as it is generated.

    Args:
        engine: the engine to run.
        tokenizer: the tokenizer of the same bundle.
        prompt: the text to continue.
        new_tokens: largest number of tokens to generate.
        sampling: how to choose the tokens.
        stop: texts that end the answer; they are not yielded.

    Yields:
        pieces of text, each as soon as it is certain: a character is held back until it has all
        its bytes, and text that may begin a stop string until it turns out not to.

    Raises:
        UsageError: the prompt or a stop string is empty.
        InputError: the prompt is not valid Unicode.
    """
    require_text(prompt, *stop)
    given = tokenizer.encode(prompt)
    ids = generate(engine, given, new_tokens=new_tokens, stop=tokenizer.stop, sampling=sampling)
    yield from until(pieces(tokenizer, ids, given), stop)


def require_text(*texts: str) -> None:
    """Refuse an empty prompt or stop string.

    Raises:
        UsageError: one of the texts is empty.
    """
    if not all(texts):
        raise UsageError(
            "a prompt or stop string is empty", fix="give at least one character of text"
        )


def pieces(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of a stream of ids, in pieces of whole characters; see `Decoder`."""
    decoder = Decoder(tokenizer, before)
    for token in ids:
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.finish():
        yield rest


def until(texts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield text up to the first stop string, which is left out; see `StopStrings`."""
    strings = StopStrings(stop)
    for text in texts:
        if piece := strings.push(text):
            yield piece
        if strings.found:
            return
    if rest := strings.finish():
        yield rest


class Decoder:
    """Decodes ids that come one by one, and holds back characters that are not complete."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """Start without ids.

        Args:
            tokenizer: decodes the ids.
            before: ids just before the first one, such as the prompt's. Some tokenizers drop the
                space before the first word that they decode, so ids are always decoded together
                with a few ids before them.
        """
        self._tokenizer = tokenizer
        self._before = list(before[-_CONTEXT:])
        self._fresh: list[int] = []

    def push(self, token: int) -> str:
        """Add an id, and return the text that is certain now; it may be empty."""
        self._fresh.append(token)
        text = self._text(self._fresh)
        if not text or text.endswith("\ufffd"):
            return self._part(text) if len(self._fresh) > _HELD else ""
        self._before, self._fresh = self._fresh, []
        return text

    def _part(self, text: str) -> str:
        """Return what to pass on of a text that has ended within a character for too many ids.

        Later ids may still complete its last character; the characters before that are final.
        """
        for cut in range(1, 5):  # number of ids of the last character so far
            before, fresh = self._fresh[:-cut], self._fresh[-cut:]
            certain = self._text(before)
            if certain + "\ufffd" == text:
                self._before, self._fresh = before[-_CONTEXT:], fresh
                return certain
        self._before, self._fresh = self._fresh[-_CONTEXT:], []
        return text

    def finish(self) -> str:
        """Return the text that was held back, at the end of the ids."""
        return self._text(self._fresh)

    def _text(self, fresh: Sequence[int]) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *fresh])[len(known) :]


class StopStrings:
    """Passes text on up to the first stop string, and holds back text that may begin one.

    The first stop string is the one that ends first; of several that end together, the longest. The
    cost of a character does not depend on the length of the strings (Knuth, Morris and Pratt,
    1977).

    Attributes:
        found: a stop string was found; all later text is to be ignored.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for any of these strings, none of which may be empty."""
        self._stop = [_Search(end) for end in stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text, and return the text that can be passed on now; it may be empty."""
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
        """Return the text held back, at the end of the text; empty after a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        passed, self._held = self._held[:length], self._held[length:]
        return passed


class _Search:
    """Looks for one string in a text that comes character by character.

    Attributes:
        length: number of characters of the string.
        matched: length of the longest beginning of the string with which the text so far ends.
    """

    def __init__(self, wanted: str) -> None:
        self.length = len(wanted)
        self.matched = 0
        self._wanted = wanted
        # For every beginning of the string that has matched so far: the length of the longest
        # shorter beginning with which it ends.
        self._borders: list[int] = []

    def push(self, character: str) -> bool:
        """Add a character, and return whether the text now ends with the string."""
        if self.matched == self.length:
            self.matched = self._borders[-1]
        self.matched = self._longer(self.matched, character)
        if self.matched > len(self._borders):
            border = self._longer(self._borders[-1], character) if self._borders else 0
            self._borders.append(border)
        return self.matched == self.length

    def _longer(self, matched: int, character: str) -> int:
        """Return how many characters match after one more, when `matched` did before it."""
        while matched and self._wanted[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._wanted[matched] == character)
