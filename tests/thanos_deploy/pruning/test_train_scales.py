"""The scales of a whole model, trained with the dense model as the teacher."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import VOCABULARY, MakeModel
from thanos_deploy.errors import InputError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.pruning import train_scales as training
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.pruning.train_scales import Scales, train_scales
from thanos_deploy.ranks.sharded import Sharded
from thanos_deploy.solver.codes import holdable
from thanos_deploy.solver.grid import parse

SEGMENTS = torch.randint(VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(0))


def quantised(source: Path, out: Path, spelling: str) -> tuple[Checkpoint, Codes]:
    for name in ("model", "codes"):
        (out / name).mkdir(parents=True)
    quantise_model(Checkpoint.open(source), SEGMENTS, out / "model", out / "codes", parse(spelling))
    return Checkpoint.open(out / "model"), Codes.open(out / "codes")


def trained(source: Path, before: Path, out: Path, count: int) -> Recovery:
    for name in ("model", "codes"):
        (out / name).mkdir(parents=True)
    model, codes = Checkpoint.open(before / "model"), Codes.open(before / "codes")
    dense = Checkpoint.open(source)
    return train_scales(model, codes, dense, SEGMENTS, out / "model", out / "codes", count=count)


def divergence(folder: Path, dense: Path) -> float:
    """Nats per token by which a model's expectations differ from the dense model's."""
    with torch.no_grad():
        learned, wanted = (
            load_model(one)(SEGMENTS).logits.double().log_softmax(dim=-1) for one in (folder, dense)
        )
    return float((wanted.exp() * (wanted - learned)).sum(dim=-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "spelling"), [("llama", "int4:16"), ("gpt2", "int4:16:asym")]
)
def test_the_model_comes_nearer_and_its_codes_stay(
    make_model: MakeModel, tmp_path: Path, model_type: str, spelling: str
) -> None:
    source = make_model(model_type)
    model, codes = quantised(source, tmp_path / "before", spelling)
    lesson = trained(source, tmp_path / "before", tmp_path / "after", 800)
    before, after = (divergence(tmp_path / one / "model", source) for one in ("before", "after"))
    assert after < 0.95 * before
    assert lesson.tokens == 800 * 60
    assert lesson.divergence[-1] < lesson.divergence[0]
    learned, moved = Codes.open(tmp_path / "after" / "codes"), 0
    for name in model.linears:
        was = codes.of(name, model.linear(name))
        now = learned.of(name, Checkpoint.open(tmp_path / "after" / "model").linear(name))
        assert now.codes.equal(was.codes)
        assert now.zero.equal(was.zero)
        assert holdable(now.scale, now.grid).equal(now.scale)
        moved += int((now.scale != was.scale).sum())
    assert moved
    files = [
        load_file(tmp_path / one / "model" / "model.safetensors") for one in ("before", "after")
    ]
    layers = {f"{name}.weight" for name in model.linears}
    assert all(files[1][name].equal(one) for name, one in files[0].items() if name not in layers)


@torch.no_grad()
def test_the_gradient_is_that_of_a_float64_model(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint, codes = quantised(tiny_llama, tmp_path, "int4:16")
    layers = {name: codes.of(name, checkpoint.linear(name)) for name in checkpoint.linears}
    model = load_model(tmp_path / "model")
    model.requires_grad_(False)
    for name in layers:
        model.get_parameter(f"{name}.weight").requires_grad_(True)
    student = Scales(Sharded(model, []), layers)
    exact = load_model(tmp_path / "model").double()
    with torch.enable_grad():
        model(SEGMENTS[:2]).logits.square().mean().backward()
        factors = {
            name: torch.ones_like(one.scale, dtype=torch.float64, requires_grad=True)
            for name, one in layers.items()
        }
        made = {
            f"{name}.weight": (one.codes.double().reshape(*one.scale.shape, 16))
            .mul((factors[name] * one.scale)[:, :, None])
            .flatten(1)
            for name, one in layers.items()
        }
        logits = torch.func.functional_call(exact, made, (SEGMENTS[:2],)).logits
        logits.square().mean().backward()
    student.set_gradients()
    for part, factor in zip(student.learned, factors.values(), strict=True):
        found = part.tensor
        assert found.grad is not None
        assert factor.grad is not None
        expected = factor.grad.float()
        torch.testing.assert_close(
            found.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


def test_steps_of_no_size_change_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Scales, "rate", 0.0)
    quantised(tiny_llama, tmp_path / "before", "int4:16")
    trained(tiny_llama, tmp_path / "before", tmp_path / "after", 8)
    before, after = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / one).rglob("*.safetensors"))}
        for one in ("before", "after")
    )
    assert len(before) == 3
    assert before == after


def test_codes_of_another_model_are_refused(
    make_model: MakeModel, tiny_llama: Path, tmp_path: Path
) -> None:
    quantised(tiny_llama, tmp_path / "one", "int4:16")
    model, _ = quantised(tiny_llama, tmp_path / "other", "int4:32")
    codes = Codes.open(tmp_path / "one" / "codes")
    with pytest.raises(InputError, match="do not match the weight"):
        train_scales(model, codes, Checkpoint.open(tiny_llama), SEGMENTS, None, None, count=1)
