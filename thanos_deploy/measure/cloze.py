"""Last words: a model has to say the word that ends a sentence and occurred before.

The questions are made from the text that perplexity is measured on, after the idea of LAMBADA
(Paperno et al., arXiv 1606.06031): to know such a word takes the passage, and not the sentence
alone. A word counts if

- it ends a sentence: `.`, `!` or `?` follows, behind closing quotes and brackets if there are any,
  each with or without a space before it, and then a space or the end of the text;
- it has at least four letters, and nothing but letters;
- the same word, whatever its capitals, stands in the same segment before it, and so do at least
  `_LEAST_BEFORE` tokens;
- it begins and ends where tokens do.

All such words are taken, so there is nothing to draw. An answer is right if each of the word's
tokens is the likeliest one after those before it, which is to say if the model, continuing
greedily, writes the word. That is seen in the logits of the pass that perplexity takes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Where a token is in a text: its first character, and the one behind it.
Offset = tuple[int, int]

# Texts such as WikiText put a space between a word and the mark behind it.
_CLOSING = "(?: ?[\"'\u201d\u2019)\\]])*"
_LAST_WORD = re.compile(rf"(?<!\w)[^\W\d_]{{4,}}(?={_CLOSING} ?[.!?]{_CLOSING}(?:\s|$))")
_WORD = re.compile(r"[^\W\d_]+")

# Tokens that stand before a word in its segment.
_LEAST_BEFORE = 32


@dataclass(frozen=True, slots=True)
class LastWord:
    """Where a word is.

    Attributes:
        segment: its number.
        start, stop: of its tokens in the segment.
    """

    segment: int
    start: int
    stop: int


def last_words(content: str, offsets: Sequence[Sequence[Offset]], frame: int) -> list[LastWord]:
    """The questions in the segments of a text; see the module.

    Args:
        content: the text.
        offsets: of each segment, where the tokens behind its frame are in the text.
        frame: tokens of it.
    """
    return [
        LastWord(number, first + frame, last + frame)
        for number, segment in enumerate(offsets)
        for first, last in _in_segment(content, segment)
    ]


def _in_segment(content: str, offsets: Sequence[Offset]) -> list[tuple[int, int]]:
    """The first token of each such word, and the one behind it, among those of a segment."""
    begin, end = offsets[0][0], offsets[-1][1]
    starts: dict[int, int] = {}
    for number, (start, stop) in enumerate(offsets):
        token = content[start:stop]
        # A space before a word may belong to its first token.
        if token.strip():
            starts.setdefault(start + len(token) - len(token.lstrip()), number)
    stops = {stop: number + 1 for number, (_, stop) in enumerate(offsets)}
    seen: dict[str, int] = {}  # where each word is first
    for word in _WORD.finditer(content, begin, end):
        seen.setdefault(word[0].casefold(), word.start())
    found = []
    for word in _LAST_WORD.finditer(content, begin):
        if word.end() > end:
            break
        first, last = starts.get(word.start()), stops.get(word.end())
        before = seen.get(word[0].casefold(), word.start()) < word.start()
        if before and first is not None and last is not None and first >= _LEAST_BEFORE:
            found.append((first, last))
    return found


def answered(questions: Sequence[LastWord], ids: Tensor, likeliest: Tensor) -> list[bool]:
    """Which words a model would write.

    Args:
        questions: about these segments.
        ids: int64[count, length], their tokens.
        likeliest: int64[count, length], the likeliest token after each.
    """
    right = ids[:, 1:] == likeliest[:, :-1]
    return [bool(right[one.segment, one.start - 1 : one.stop - 1].all()) for one in questions]
