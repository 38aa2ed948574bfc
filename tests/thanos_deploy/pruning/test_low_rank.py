"""Updates of a low rank under the mask of a pruned model."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.thanos_deploy.pruning.test_recover import (
    SEGMENTS,
    TOKENS_A_STEP,
    divergence,
    shrunk,
    two_four,
)
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.low_rank import LowRank
from thanos_deploy.pruning.recover import recover
from thanos_deploy.ranks.sharded import Sharded

RANK = 3


class Whole:
    """The learner of a process that has the only weight of a model by itself."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight)
        self.model = SimpleNamespace(get_parameter=lambda _: self.weight, device=weight.device)

    def own(self, _: str) -> Tensor:
        return self.weight.detach()

    def gradient(self, _: str) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad

    def whole(self, rows: Tensor, _: str) -> Tensor:
        return rows

    def rows(self, tensor: Tensor, _: str) -> Tensor:
        return tensor


def test_gradients_and_weights_are_those_of_the_definition() -> None:
    """W + M * (U V) in float64, differentiated by autograd, over steps of any direction."""
    generator = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 12, 8, generator=generator).unbind()
    start = start * (torch.rand(12, 8, generator=generator) < 0.5)
    learner = Whole(start.clone())
    student = LowRank(cast(Sharded, learner), ["w"], RANK, seed=0)
    left, right = learned = [one.tensor for one in student.learned]
    assert (left.shape, right.shape) == ((12, RANK), (RANK, 8))
    for _ in range(3):
        u, v = (one.double().requires_grad_() for one in (left, right))
        exact = start.double() + (start != 0) * (u @ v)
        torch.testing.assert_close(
            learner.weight.detach().double(), exact.detach(), rtol=1e-5, atol=1e-6
        )
        (0.01 * (exact * slope.double()).tanh().sum()).backward()
        learner.weight.grad = None
        (0.01 * (learner.weight * slope).tanh().sum()).backward()
        student.set_gradients()
        for found, wanted in zip(learned, (u.grad, v.grad), strict=True):
            assert found.grad is not None
            assert wanted is not None
            torch.testing.assert_close(found.grad.double(), wanted, rtol=1e-4, atol=1e-7)
            found.sub_(torch.randn(found.shape, generator=generator))
        student.update_weights()
    assert torch.equal(learner.weight == 0, start == 0)


def test_a_small_matrix_has_no_larger_rank_than_its_size() -> None:
    learner = Whole(torch.ones(2, 8))
    student = LowRank(cast(Sharded, learner), ["w"], 64, 0)
    assert [tuple(one.tensor.shape) for one in student.learned] == [(2, 2), (2, 8)]


@pytest.mark.slow
def test_only_so_much_of_a_cut_model_changes_and_it_comes_nearer(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos_deploy.pruning.recover._TOKENS_A_STEP", TOKENS_A_STEP)
    pruned, out = shrunk(tiny_llama, tmp_path / "shrunk"), tmp_path / "trained"
    out.mkdir()
    recover(pruned, Checkpoint.open(tiny_llama), SEGMENTS, out, count=96, update_rank=RANK)
    after = Checkpoint.open(out)
    for name in pruned.linears:
        change = torch.linalg.svdvals(after.linear(name).double() - pruned.linear(name).double())
        assert int((change > 1e-4 * change[0]).sum()) == RANK, name
    assert divergence(out, tiny_llama) < divergence(pruned.folder, tiny_llama)


@pytest.mark.slow
def test_zeros_stay_and_the_same_seed_gives_the_same_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos_deploy.pruning.recover._TOKENS_A_STEP", TOKENS_A_STEP)
    pruned, dense = two_four(tiny_llama, tmp_path / "pruned"), Checkpoint.open(tiny_llama)
    made = []
    for out in (tmp_path / "one", tmp_path / "other"):
        out.mkdir()
        recover(pruned, dense, SEGMENTS, out, count=48, update_rank=RANK)
        made.append(Checkpoint.open(out))
    for name in pruned.linears:
        before, one, other = (model.linear(name) for model in (pruned, *made))
        assert torch.equal(one, other), name
        assert torch.equal(before == 0, one == 0), name
        assert not torch.equal(before, one), name
    assert divergence(tmp_path / "one", tiny_llama) < divergence(pruned.folder, tiny_llama)
