import re

import pytest
import torch

from thanos_deploy.measure.cloze import LastWord, Offset, answered, last_words

FILLER = "one two three four five six seven eight nine ten " * 8


def words_of(content: str) -> list[Offset]:
    """Tokens that are words with the space before them, or single other characters."""
    return [match.span() for match in re.finditer(r" ?[^\W\d_]+|.", content, re.DOTALL)]


def found(content: str, offsets: list[Offset] | None = None) -> list[str]:
    offsets = words_of(content) if offsets is None else offsets
    return [
        content[offsets[one.start][0] : offsets[one.stop - 1][1]].strip()
        for one in last_words(content, [offsets], 0)
    ]


@pytest.mark.parametrize(
    ("sentence", "asked"),
    [
        ("The teacher came. She was a teacher. ", ["teacher"]),
        ("The teacher came. She was a Teacher! ", ["Teacher"]),
        ("The teacher came. He said (to the teacher). ", ["teacher"]),
        ("The teacher came. He said \u201cteacher.\u201d Then", ["teacher"]),
        ("The teacher came . She was a teacher . Then ", ["teacher"]),  # as in WikiText
        ("The teacher came . He said ( to the teacher ) . ", ["teacher"]),
        ("The teacher came. He saw the teacher .net ", []),
        ("The teacher came. She was a teacher.", ["teacher"]),  # the end of the text
        ("The teacher came. She was a pupil. ", []),  # which did not occur
        ("The teacher came. Two teachers. ", []),  # which is another word
        ("He saw her. She saw her. ", []),  # too short
        ("The teacher came, the teacher, too. ", []),  # no end of a sentence
        ("The teacher came. See teacher.py for it. ", []),
        ("The teacher2 came. See my_teacher. ", []),
        ("An x1teacher came. A teacher. ", ["teacher"]),
    ],
)
def test_words_that_end_a_sentence_and_occurred_before_are_asked(
    sentence: str, asked: list[str]
) -> None:
    assert found(FILLER + sentence) == asked


def test_a_word_needs_a_passage_before_it() -> None:
    sentence = "A teacher is a teacher. "
    assert found(sentence) == []
    assert found("he " * 40 + sentence) == ["teacher"]


def test_a_word_that_tokens_do_not_part_from_others_is_left_out() -> None:
    content = FILLER + "The teacher came. She was a teacher. "
    offsets = words_of(content)
    joined = [*offsets[:-3], (offsets[-3][0], offsets[-2][1]), offsets[-1]]  # "teacher."
    assert content[slice(*joined[-2])] == " teacher."
    assert found(content, joined) == []


def test_a_word_of_several_tokens_is_asked_as_a_whole_in_its_own_segment() -> None:
    content = FILLER + "The teacher came. She was a teacher. " + FILLER
    letters = [(at, at + 1) for at in range(len(content))]
    at = content.index("teacher. ")
    half = at + 20
    (only,) = last_words(content, [letters[:half], letters[half:]], 3)
    assert only == LastWord(0, at + 3, at + len("teacher") + 3)
    # In a segment that begins behind the first one it did not occur before.
    begin = content.index("came")
    assert last_words(content, [letters[begin:]], 0) == []


def test_an_answer_is_right_if_every_token_is_the_likeliest() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    questions = [LastWord(0, 1, 3), LastWord(0, 3, 5)]
    likeliest = torch.tensor([[6, 7, 0, 9, 0]])
    assert answered(questions, ids, likeliest) == [True, False]
