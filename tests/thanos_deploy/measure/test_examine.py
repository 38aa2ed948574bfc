"""What a model is asked about a text, against the definitions in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import VOCABULARY, MakeModel, stock_model
from thanos_deploy.calibration.frame import Frame
from thanos_deploy.calibration.segments import every_segment
from thanos_deploy.calibration.texts import Text
from thanos_deploy.measure.examine import Examination, examine, examine_dense
from thanos_deploy.measure.fidelity import _WRITTEN as WRITTEN
from thanos_deploy.measure.fidelity import Outputs
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.head import read_head
from thanos_deploy.model.load import load_tokenizer

TEXT = Text("a text", "The house by the river was an old house. Nobody saw the river. " * 30)
LENGTH = 300


@pytest.fixture(scope="module", params=["llama", "gemma2", "granite"])
def dense(request: pytest.FixtureRequest, make_model: MakeModel) -> Path:
    return make_model(request.param, max_position_embeddings=400)


@pytest.fixture(params=[0, 1], ids=["bare", "framed"])
def examination(request: pytest.FixtureRequest, dense: Path) -> Examination:
    frame = Frame((256,), ("<end>",)) if request.param else Frame()
    own = LENGTH - len(frame)
    tokenizer = load_tokenizer(dense)
    ids = frame.before(every_segment(TEXT, tokenizer, length=own)[:3])
    return Examination.of(TEXT, tokenizer, ids, frame, questions=12)


def other(folder: Path) -> Any:
    """The model, a little changed."""
    model = stock_model(folder)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=draw)
    return model


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return torch.stack([model(row[None]).logits[0] for row in ids]).double().log_softmax(dim=-1)


def test_a_model_beside_the_dense_one(
    dense: Path, examination: Examination, tmp_path: Path
) -> None:
    teacher, model = stock_model(dense), other(dense)
    quality, outputs = examine_dense(teacher, examination, 400)
    outputs.write(tmp_path / "outputs.safetensors")
    kept = Outputs.read(tmp_path / "outputs.safetensors")
    head = read_head(Checkpoint.open(dense))
    found = examine(model, examination, kept, head)

    ids, frame = examination.ids, len(examination.frame)
    for one, own in ((teacher, quality), (model, found)):
        assert own.value == pytest.approx(perplexity(one, ids, frame=frame).value, rel=1e-5)
        assert (own.segments, own.length) == (3, LENGTH)

    first = max(frame, 1) - 1
    q, p = (log_probabilities(one, ids)[:, first:-1] for one in (teacher, model))
    near = found.fidelity
    assert near is not None
    expected = (q.exp() * (q - p)).sum(dim=-1).mean().item()
    assert near.divergence == pytest.approx(expected, rel=1e-4)
    same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean().item()
    assert near.agreement == pytest.approx(same)

    texts = ids[:, :32]
    with torch.inference_mode():
        for _ in range(WRITTEN):
            following = teacher(texts, use_cache=False).logits[:, -1].argmax(dim=-1)
            texts = torch.cat([texts, following[:, None]], dim=1)
    assert torch.equal(kept.written, texts)
    right = log_probabilities(model, texts)[:, 31:-1].argmax(dim=-1) == texts[:, 32:]
    assert (near.texts, near.tokens) == (3, WRITTEN)
    assert near.continued == pytest.approx(right.sum(dim=1).double().mean().item())
    beginnings = [[*row.tolist(), False].index(False) for row in right]
    assert near.before_first == pytest.approx(sum(beginnings) / 3)


def test_the_dense_model_beside_itself(dense: Path, examination: Examination) -> None:
    model = stock_model(dense)
    quality, outputs = examine_dense(model, examination, 400)
    found = examine(model, examination, outputs, read_head(Checkpoint.open(dense)))
    assert found.fidelity is not None
    assert found.fidelity.divergence == pytest.approx(0.0, abs=1e-6)
    assert found.fidelity.agreement == 1.0
    assert found.fidelity.continued == found.fidelity.before_first == WRITTEN
    for own, before in ((found.words, quality.words), (found.choices, quality.choices)):
        assert own is not None
        assert before is not None
        assert own.accuracy == before.accuracy
        assert before.change is None
        assert own.change is not None
        assert own.change.estimate == 0.0
    assert examine(model, examination) == quality


def test_texts_that_are_written_end_where_the_model_does(
    dense: Path, examination: Examination
) -> None:
    _, outputs = examine_dense(stock_model(dense), examination, 50)
    assert outputs.written.shape == (3, 50)


def test_without_a_plain_head_everything_but_the_divergence_is_measured(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", max_position_embeddings=400)
    tokenizer = load_tokenizer(folder)
    ids = every_segment(TEXT, tokenizer, length=LENGTH)[:2]
    examination = Examination.of(TEXT, tokenizer, ids, Frame(), questions=3)
    model = stock_model(folder)
    expected = examine_dense(model, examination, 60)
    model.config.final_logit_softcapping = 1.0  # which this type does not read
    quality, outputs = examine_dense(model, examination, 60)
    assert quality.value == pytest.approx(expected[0].value, rel=1e-6)
    outputs.write(tmp_path / "outputs.safetensors")
    kept = Outputs.read(tmp_path / "outputs.safetensors")
    assert kept.states is None
    assert torch.equal(kept.written, expected[1].written)
    near = examine(model, examination, kept, read_head(Checkpoint.open(folder))).fidelity
    assert near is not None
    assert near.divergence is None
    assert near.agreement == 1.0


def test_words_are_answered_as_the_model_continues_them(make_model: MakeModel) -> None:
    """A model that repeats what is last in its embedding's order knows no word."""
    folder = make_model("llama", max_position_embeddings=400)
    tokenizer = load_tokenizer(folder)
    ids = every_segment(TEXT, tokenizer, length=LENGTH)[:3]
    examination = Examination.of(TEXT, tokenizer, ids, Frame(), questions=0)
    assert len(examination.words) > 10
    found = examine(stock_model(folder), examination)
    assert found.words is not None
    assert found.words.questions == len(examination.words)
    assert found.words.accuracy.estimate < 0.2
    assert found.choices is None
    assert int(ids.max()) < VOCABULARY
