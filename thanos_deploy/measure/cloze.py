"""Last words: a model has to predict the last word of a sentence, which has occurred before.

The questions are made from the text that perplexity is measured on, after the idea of LAMBADA
(Paperno et al., arXiv 1606.06031): such a word can be guessed from the whole passage, but not from
its sentence alone. A word counts if

- it ends a sentence: `.`, `!` or `?` follows, and then a space or the end of the text; there may be
  closing quotes and brackets before and after the mark, and a space before each of these;
- it has at least four letters, and nothing but letters;
- the same word, in upper or lower case, stands earlier in the same segment;
- at least `_LEAST_BEFORE` tokens of the segment stand before it;
- it begins at the beginning of a token and ends at the end of a token.

All such words are taken; none are drawn at random. An answer is right if each token of the word is
the likeliest one after the tokens before it, that is, if the model writes the word when it
continues greedily. The forward pass that measures perplexity has the logits for this.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# The place of a token in a text: the index of its first character, and of the one after its last.
Offset = tuple[int, int]

# Texts such as WikiText put a space between a word and the punctuation mark after it.
_CLOSING = "(?: ?[\"'\u201d\u2019)\\]])*"
_LAST_WORD = re.compile(rf"(?<!\w)[^\W\d_]{{4,}}(?={_CLOSING} ?[.!?]{_CLOSING}(?:\s|$))")
_WORD = re.compile(r"[^\W\d_]+")

# The fewest tokens before a word in its segment.
_LEAST_BEFORE = 32


@dataclass(frozen=True, slots=True)
class LastWord:
    """The place of a word that a model has to predict.

    Attributes:
        segment: index of the segment.
        start, stop: its tokens in the segment, from `start` to before `stop`; the frame counts.
    """

    segment: int
    start: int
    stop: int


def last_words(content: str, offsets: Sequence[Sequence[Offset]], frame: int) -> list[LastWord]:
    """Find the questions in the segments of a text; see the module.

    Args:
        content: the text.
        offsets: for each segment, the offsets in the text of the tokens after its frame.
        frame: number of tokens of the frame.
    """
    return [
        LastWord(number, first + frame, last + frame)
        for number, segment in enumerate(offsets)
        for first, last in _in_segment(content, segment)
    ]


def _in_segment(content: str, offsets: Sequence[Offset]) -> list[tuple[int, int]]:
    """The questions of one segment: for each word, its first token and the one after its last."""
    begin, end = offsets[0][0], offsets[-1][1]
    starts: dict[int, int] = {}
    for number, (start, stop) in enumerate(offsets):
        token = content[start:stop]
        # A space before a word may belong to its first token.
        if token.strip():
            starts.setdefault(start + len(token) - len(token.lstrip()), number)
    stops = {stop: number + 1 for number, (_, stop) in enumerate(offsets)}
    seen: dict[str, int] = {}  # the place of each word's first occurrence
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
    """Return, for each question, whether a model predicts the word.

    Args:
        questions: the words.
        ids: int64[count, length], tokens of the segments.
        likeliest: int64[count, length], the model's likeliest token after each of them.
    """
    right = ids[:, 1:] == likeliest[:, :-1]
    return [bool(right[one.segment, one.start - 1 : one.stop - 1].all()) for one in questions]
