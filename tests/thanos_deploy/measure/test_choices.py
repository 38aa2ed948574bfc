import pytest
import torch
from torch import Tensor

from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel, stock_model
from thanos_deploy.measure.choices import AFTER, BEFORE, CHOICES, Questions, answered, questions
from thanos_deploy.measure.choices import _log_probabilities as log_probabilities

CONTENT = "The quick brown fox_x jumps over 12 lazy dogs, and then it sleeps. " * 40
LENGTH = 400
FRAME = 2
OFFSETS = [
    [(at, at + 1) for at in range(start, start + LENGTH - FRAME)]
    for start in range(0, 3 * (LENGTH - FRAME), LENGTH - FRAME)
]
# Every token is another number, so that it is known where a piece is from.
IDS = torch.arange(3 * LENGTH).reshape(3, LENGTH)


def asked(count: int) -> Questions:
    return questions(CONTENT, OFFSETS, IDS, frame=FRAME, count=count)


def character(token: Tensor) -> str:
    segment, place = divmod(int(token), LENGTH)
    return CONTENT[OFFSETS[segment][place - FRAME][0] :]


def test_one_choice_goes_on_and_the_others_are_from_elsewhere_in_the_segment() -> None:
    made = asked(50)
    assert len(made) == 50
    assert made.continuations.shape == (50, CHOICES, AFTER)
    for beginning, choices in zip(made.beginnings, made.continuations, strict=True):
        segment = int(beginning[0]) // LENGTH
        assert beginning[:FRAME].tolist() == IDS[segment, :FRAME].tolist()
        own = beginning[FRAME:]
        assert len(own) == BEFORE
        assert torch.equal(own, torch.arange(own[0], own[0] + BEFORE))
        assert choices[0, 0] == own[-1] + 1
        for choice in choices:
            assert torch.equal(choice, torch.arange(choice[0], choice[0] + AFTER))
            assert int(choice[0]) // LENGTH == segment
        others = torch.cat([own, choices.flatten()])
        assert len(others.unique()) == len(others)


def test_every_choice_begins_a_word() -> None:
    for choice in asked(50).continuations[:, :, 0].flatten():
        rest = character(choice)
        before = CONTENT[len(CONTENT) - len(rest) - 1]
        assert rest[0].isalpha()
        assert before == " "  # not the x behind "fox_"


def test_questions_are_drawn_once_for_all() -> None:
    few, many = asked(10), asked(30)
    assert torch.equal(few.beginnings, asked(10).beginnings)
    assert torch.equal(few.beginnings, many.beginnings[:10])


def test_there_are_as_many_as_the_text_has_room_for() -> None:
    assert 50 < len(asked(100_000)) < LENGTH
    nothing = questions(CONTENT, [OFFSETS[0][:20]], IDS[:1, : 20 + FRAME], frame=FRAME, count=5)
    assert len(nothing) == 0
    assert len(asked(0)) == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_probabilities_are_those_of_reading_each_choice_by_itself(
    make_model: MakeModel, model_type: str
) -> None:
    model = stock_model(make_model(model_type))
    draw = torch.Generator().manual_seed(0)
    beginnings = torch.randint(VOCABULARY, (9, BEFORE), generator=draw)
    continuations = torch.randint(VOCABULARY, (9, CHOICES, AFTER), generator=draw)
    expected = torch.zeros(9, CHOICES, dtype=torch.float64)
    with torch.inference_mode():
        for question, beginning in enumerate(beginnings):
            for number, choice in enumerate(continuations[question]):
                logits = model(torch.cat([beginning, choice])[None]).logits[0].double()
                told = logits.log_softmax(dim=-1)[BEFORE - 1 : -1]
                expected[question, number] = told.gather(1, choice[:, None]).sum()
        found = log_probabilities(model, beginnings, continuations)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    made = Questions(beginnings, continuations)
    assert answered(model, made) == (expected.argmax(dim=1) == 0).tolist()
