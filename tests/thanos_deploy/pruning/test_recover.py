from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import VOCABULARY, MakeModel
from tests.model_types import MIXTURES
from tests.recipes import plain
from tests.thanos_deploy.model.test_experts import write_mixture
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.load import load_model
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recover import _order, _pull, recover
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Allocation, Fit, Sizing
from thanos_deploy.shrink.survey import survey

pytestmark = pytest.mark.slow

# Of the few segments that there are, more would be the same again.
TOKENS_A_STEP = 512

SEGMENTS = torch.randint(VOCABULARY, (5, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_deploy.pruning.recover._TOKENS_A_STEP", TOKENS_A_STEP)


def shrunk(folder: Path, out: Path, *, allocation: Allocation = "uniform") -> Checkpoint:
    out.mkdir()
    dense = Checkpoint.open(folder)
    plan = sizing.plan(dense, survey(dense, SEGMENTS), 0.2, Sizing("ffn", None, allocation))
    shrink(dense, SEGMENTS, out, plan, Fit())
    return Checkpoint.open(out)


def two_four(folder: Path, out: Path) -> Checkpoint:
    return zeros(folder, out, "2:4")


def zeros(folder: Path, out: Path, spelled: str) -> Checkpoint:
    out.mkdir()
    prune(Checkpoint.open(folder), SEGMENTS, out, plain(parse(spelled)))
    return Checkpoint.open(out)


def trained(pruned: Checkpoint, folder: Path, out: Path, count: int = 375) -> Recovery:
    out.mkdir()
    return recover(pruned, Checkpoint.open(folder), SEGMENTS, out, count=count)


def divergence(folder: Path, dense: Path) -> float:
    """Nats per token by which a model's expectations differ from the dense model's."""
    with torch.no_grad():
        learned, wanted = (
            load_model(one)(SEGMENTS).logits.double().log_softmax(dim=-1) for one in (folder, dense)
        )
    return float((wanted.exp() * (wanted - learned)).sum(dim=-1).mean())


def test_a_shrunk_model_comes_nearer_to_the_dense_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos_deploy.pruning.recover._TOKENS_A_STEP", 2048)
    pruned = shrunk(tiny_llama, tmp_path / "shrunk")
    recovery = trained(pruned, tiny_llama, tmp_path / "trained", count=1500)
    before, after = (divergence(tmp_path / one, tiny_llama) for one in ("shrunk", "trained"))
    assert after < 0.98 * before
    assert recovery.tokens == 1500 * 60
    assert len(recovery.divergence) == 10
    assert after < recovery.divergence[0] < 1.01 * before
    assert sorted(recovery.divergence, reverse=True) == list(recovery.divergence)


def test_zeros_stay_zero_and_only_linear_layers_learn(tiny_llama: Path, tmp_path: Path) -> None:
    pruned = two_four(tiny_llama, tmp_path / "pruned")
    trained(pruned, tiny_llama, tmp_path / "trained")
    before, after = (
        load_file(tmp_path / one / "model.safetensors") for one in ("pruned", "trained")
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "_proj" in name:
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name]), name
        else:
            assert torch.equal(weight, after[name]), name
    assert divergence(tmp_path / "trained", tiny_llama) < divergence(
        tmp_path / "pruned", tiny_llama
    )


@pytest.mark.parametrize("spelled", ["2:4", "4:8", "unstructured:0.5", "structured:0.3"])
@pytest.mark.parametrize("model_type", ["llama", *MIXTURES])
def test_every_pattern_of_zeros_stays_and_comes_nearer(
    make_model: MakeModel, tmp_path: Path, model_type: str, spelled: str
) -> None:
    """Columns of zeros among the patterns, and experts among the layers."""
    if model_type in MIXTURES:
        family = family_of(model_type)
        folder = write_mixture(tmp_path / "dense", family, MIXTURES[model_type])
    else:
        folder = make_model(model_type)
    pruned = zeros(folder, tmp_path / "pruned", spelled)
    trained(pruned, folder, tmp_path / "trained", count=80)
    after = Checkpoint.open(tmp_path / "trained")
    assert after.linears == pruned.linears
    for name in pruned.linears:
        assert torch.equal(pruned.linear(name) == 0, after.linear(name) == 0), name
    assert divergence(tmp_path / "trained", folder) < divergence(tmp_path / "pruned", folder)


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox"])
def test_every_family_learns_and_loads_again(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    trained(shrunk(folder, tmp_path / "shrunk"), folder, tmp_path / "trained")
    assert divergence(tmp_path / "trained", folder) < divergence(tmp_path / "shrunk", folder)


def test_widths_that_differ_from_block_to_block_stay(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", num_hidden_layers=3)
    pruned = shrunk(folder, tmp_path / "shrunk", allocation="loss")
    trained(pruned, folder, tmp_path / "trained")
    assert Checkpoint.open(tmp_path / "trained").widths == pruned.widths
    assert divergence(tmp_path / "trained", folder) < divergence(tmp_path / "shrunk", folder)


def test_a_half_precision_checkpoint_keeps_its_dtype(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", dtype=torch.bfloat16)
    trained(two_four(folder, tmp_path / "pruned"), folder, tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert divergence(tmp_path / "trained", folder) < divergence(tmp_path / "pruned", folder)


def test_the_divergence_and_its_gradient_are_those_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 11, 4, generator=generator).unbind()
    wanted, leaf = torch.randn(2, 600, 4, generator=generator).unbind()
    leaf.requires_grad_()

    divergence = _pull(2 * leaf, wanted, (lambda x: x @ own.T, lambda x: x @ other.T), 600)

    exact = leaf.detach().double().requires_grad_()
    log_p = (2 * exact @ own.T.double()).log_softmax(-1)
    log_q = (wanted.double() @ other.T.double()).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    expected.backward()
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_any_number_of_steps_is_taken(tiny_llama: Path, tmp_path: Path, steps: int) -> None:
    pruned = two_four(tiny_llama, tmp_path / "pruned")
    segments_a_step = TOKENS_A_STEP // SEGMENTS.shape[1]
    seen: list[int] = []
    done = recover(
        pruned,
        Checkpoint.open(tiny_llama),
        SEGMENTS,
        None,
        count=steps * segments_a_step,
        watch=lambda step, _: seen.append(step),
    )
    assert seen == list(range(1, steps + 1))
    assert len(done.divergence) == min(10, steps)


def test_every_segment_comes_once_before_one_comes_again() -> None:
    order = _order(7, 17, seed=1)
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))
    assert order[:7].tolist() != order[7:14].tolist()
    assert len(order[14:].unique()) == 3


def test_the_same_seed_gives_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    pruned = two_four(tiny_llama, tmp_path / "pruned")
    for out in ("one", "other"):
        trained(pruned, tiny_llama, tmp_path / out, count=16)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
