"""Text that the dense model writes: what is drawn, what is dropped, what it depends on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import VOCABULARY, MakeModel, stock_model
from thanos_deploy.calibration.segments import every_segment
from thanos_deploy.calibration.texts import builtin_text
from thanos_deploy.errors import CalibrationError
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.pruning import own_text
from thanos_deploy.pruning.own_text import (
    Habits,
    before_question,
    beginnings,
    repeats,
    sampled,
    signs,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
)
ANYTHING = Habits(1.0, 1.0)


def written(model: Any, tokenizer: Any, habits: Habits, count: int = 5) -> tuple[list[str], int]:
    pieces = every_segment(builtin_text(), tokenizer, length=40)
    begin = beginnings(pieces, 0, tokenizer, chat=False, seed=3)
    return own_text.own_text(model, tokenizer, begin, habits, count=count, length=40, seed=3)


def test_shares_of_repetitions_and_of_signs() -> None:
    assert repeats([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeats([1, 2, 3] * 4) == pytest.approx(1 - 3 / 9)
    assert repeats([1, 2]) == 0.0
    assert signs("He said: \u201cno\u201d (twice), didn't he?") == 0.0
    assert signs("a={}") == 0.75
    assert signs("") == 1.0


def test_what_is_usual_is_what_the_calibration_text_has(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)

    def encoded(text: str) -> Tensor:
        return torch.tensor(tokenizer(text * 40)["input_ids"][:40])

    prose = torch.stack([encoded(f"{word} went home then, and so ") for word in ("he", "she")])
    habits = Habits.of(prose, tokenizer)
    assert all(habits.allow(piece, tokenizer) for piece in prose.tolist())
    assert not habits.allow(encoded("ab ").tolist(), tokenizer)
    code = encoded("if (a[i] != {b}) { x += y; } // 12345")
    assert not habits.allow(code.tolist(), tokenizer)
    assert Habits.of(code[None], tokenizer).allow(code.tolist(), tokenizer)


def test_tokens_are_drawn_by_their_probability(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"))
    begun = torch.randint(VOCABULARY, (1, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(begun).logits[0, -1]
    likeliest = logits.topk(50)
    expected = likeliest.values.softmax(dim=-1)
    draw = torch.Generator().manual_seed(1)
    drawn = sampled(model, begun.expand(4000, -1), 4, draw)[:, -1]
    share = torch.stack([(drawn == one).double().mean() for one in likeliest.indices])
    assert float(share.sum()) == 1.0
    error = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((share - expected).abs() < 5 * error).all())


@pytest.mark.slow
def test_the_same_seed_writes_the_same_text_and_drops_the_same(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "_BATCH", 4)
    monkeypatch.setattr(own_text, "_PATIENCE", 20)
    folder = make_model("llama")
    model, tokenizer = stock_model(folder), load_tokenizer(folder)
    all_of_it, drawn = written(model, tokenizer, ANYTHING)
    assert (len(all_of_it), drawn) == (5, 8)
    assert written(model, tokenizer, ANYTHING) == (all_of_it, drawn)
    # A random model writes signs of every kind, most of its pieces more than a few others.
    limit = sorted(map(signs, written(model, tokenizer, ANYTHING, 16)[0]))[3]
    some, drawn = written(model, tokenizer, Habits(1.0, limit))
    assert drawn > 8
    assert all(signs(piece.replace("<end>", "")) <= limit for piece in some)
    with pytest.raises(
        CalibrationError, match=r"of 100 pieces .* 100 were dropped, because they repeat themselves"
    ):
        written(model, tokenizer, Habits(1.0, -1.0))


def test_every_piece_begins_like_the_calibration_text(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    pieces = every_segment(builtin_text(), tokenizer, length=40)
    begin = beginnings(pieces, 0, tokenizer, chat=False, seed=0)
    known = {tuple(piece[:16].tolist()) for piece in pieces}
    assert {tuple(one.tolist()) for one in begin(0)} <= known
    assert not torch.equal(begin(0), begin(1))


def test_a_conversation_begins_as_the_template_begins_a_question(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(CalibrationError, match="no chat template"):
        before_question(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert before_question(tokenizer) == "<user>"
    begin = beginnings(torch.zeros(1, 40), 0, tokenizer, chat=True, seed=0)
    assert tokenizer.decode(begin(7)[3]) == "<user>"
