"""Pruning on a GPU, as far as a machine without one can tell: no operation mixes devices.

Every operation runs with the shapes, dtypes and devices that it would have, on tensors without
values; see `FakeCuda`. What the host reads is counted, since each read waits for the GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tests.thanos_deploy.conftest import FakeCuda
from thanos_deploy import methods
from thanos_deploy.calibration.blocks import Arguments, LoadedInputs
from thanos_deploy.calibration.collect import Walk, advance, collect, collect_relative
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.tune import tune
from thanos_deploy.calibration.visit import Clock, Visit
from thanos_deploy.measure.perplexity import losses_of, perplexity_of
from thanos_deploy.methods import thanos
from thanos_deploy.model.structure import BlockStructure
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.pruning.solution import solve_by_preset
from thanos_deploy.solver import mask as masks
from thanos_deploy.solver.damping import Damping, DampingMode
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor, retarget
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.threshold import threshold

CUDA = torch.device("cuda")
PATTERNS: tuple[Pattern, ...] = (SemiStructured(2, 4), Unstructured(0.5), Structured(0.3))


def problem(rows: int = 48, cols: int = 64, dtype: torch.dtype = torch.float32) -> LayerProblem:
    return LayerProblem(
        torch.randn(rows, cols, device=CUDA, dtype=dtype),
        torch.randn(cols, cols, device=CUDA, dtype=dtype),
        "layer",
        products=torch.bfloat16,
    )


def test_a_mixture_of_devices_is_refused(fake_cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


@pytest.mark.parametrize("mode", get_args(DampingMode))
def test_a_hessian_is_factored_there(fake_cuda: FakeCuda, mode: DampingMode) -> None:
    # Wider than what is inverted at once.
    factored = factor(problem(cols=1100), Damping(0.01, mode))
    assert (factored.V.device.type, factored.V.dtype) == ("cuda", torch.float32)
    assert factored.upper(slice(3, 9)).is_cuda
    assert factored.trailing_inverse_diagonals(32).is_cuda
    assert fake_cuda.reads == 3  # are weight and Hessian finite, is it positive definite


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("preset", methods.PRESET_NAMES)
@pytest.mark.parametrize("method", methods.names())
def test_a_method_prunes_there(
    fake_cuda: FakeCuda, method: str, preset: str, pattern: Pattern
) -> None:
    chosen = methods.load(method)
    result = chosen.prune(problem(), pattern, chosen.preset(preset).options)
    assert result.weight.is_cuda
    assert result.mask.is_cuda
    assert result.weight.shape == result.mask.shape == (48, 64)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
@pytest.mark.parametrize("refit_steps", [0, 8])
def test_thanos_waits_for_no_block_of_columns(
    fake_cuda: FakeCuda, pattern: Pattern, refit_steps: int
) -> None:
    options = thanos.Options(score="obs", block_columns=8, refit_steps=refit_steps)
    assert reads_of(fake_cuda, lambda cols: thanos.prune(problem(cols=cols), pattern, options)) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", methods.names())
def test_the_host_reads_as_often_of_a_wide_layer_as_of_a_narrow_one(
    fake_cuda: FakeCuda, method: str, pattern: Pattern
) -> None:
    chosen = methods.load(method)
    options = chosen.preset("best").options
    assert reads_of(fake_cuda, lambda cols: chosen.prune(problem(cols=cols), pattern, options)) <= 8


def test_no_head_is_waited_for(fake_cuda: FakeCuda) -> None:
    layer = problem(dtype=torch.float64)
    factored = factor(layer)
    fake_cuda.counts = 16  # heads that are there
    reads = []
    for keep in (15, 4):
        before = fake_cuda.reads
        Elimination(layer.weight, factored).drop_heads((16, 16), keep=(keep, keep))
        reads.append(fake_cuda.reads - before)
    assert reads[0] == reads[1] <= 3


def reads_of(fake_cuda: FakeCuda, work: Callable[[int], object]) -> int:
    """How often the host reads, which must not depend on the number of columns."""
    reads = []
    for cols in (64, 192):
        before = fake_cuda.reads
        work(cols)
        reads.append(fake_cuda.reads - before)
    assert reads[0] == reads[1]
    return reads[0]


def test_outlier_rows_stay_there(fake_cuda: FakeCuda) -> None:
    result = thanos.prune(problem(), SemiStructured(2, 4), thanos.Options(outlier_rows=0.25))
    assert result.weight.is_cuda


def test_the_host_does_not_read_a_threshold(fake_cuda: FakeCuda) -> None:
    scores = torch.rand(30, 40, device=CUDA)
    budget = torch.tensor(500, device=CUDA)
    mask = threshold(scores, budget).mark(scores[:, :8])
    assert mask.is_cuda
    assert mask.shape == (30, 8)
    assert fake_cuda.reads == 0


def test_statistics_add_up_there(fake_cuda: FakeCuda) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(100, 1100, device=CUDA, dtype=dtype)
        statistics = Statistics.empty(1100, 1100, device=CUDA)
        statistics.add(x, x)
        statistics.complete()
        assert statistics.hessian.is_cuda
        centred = statistics.centred()
        assert centred.hessian.is_cuda
        assert centred.cross is not None
        assert centred.cross.is_cuda
    weighted = Statistics.empty(1100, device=CUDA)
    weighted.add_weighted(x.float(), torch.rand(100, 1, device=CUDA))
    assert weighted.hessian.is_cuda


def test_a_weight_is_aimed_there(fake_cuda: FakeCuda) -> None:
    layer = problem()
    assert retarget(layer, torch.randn(64, 64, device=CUDA), 0.4).is_cuda


def test_inputs_are_eliminated_there(fake_cuda: FakeCuda) -> None:
    layer = problem(dtype=torch.float64)
    elimination = Elimination(layer.weight, factor(layer))
    assert elimination.channel_losses().is_cuda
    elimination.remove(masks.cheapest(elimination.costs(), 5))
    for tensor in (elimination.weight, elimination.left, elimination.costs()):
        assert tensor.is_cuda
    assert isinstance(elimination.cost(torch.tensor([0, 1], device=CUDA)), float)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_verdict_is_found_there(fake_cuda: FakeCuda, pattern: Pattern) -> None:
    nonzero: Tensor = torch.randn(16, 24, device=CUDA) != 0
    judge(nonzero, pattern)
    assert fake_cuda.reads <= 2


def test_a_block_runs_there_on_arguments_that_the_host_keeps(fake_cuda: FakeCuda) -> None:
    block, batch = _block_and_batch()
    assert batch.arguments[0].named["position_embeddings"][0].device.type == "cpu"
    for rows in (slice(None), slice(1, 3)):
        assert batch.forward(0, block, rows).is_cuda


@pytest.mark.parametrize("pause", [False, True])
def test_statistics_are_collected_there(fake_cuda: FakeCuda, pause: bool) -> None:
    block, batch = _block_and_batch()
    _, beside = _block_and_batch()
    walk, dense = Walk(0, block, [batch]), Walk(0, block, [beside])
    names = ["self_attn.q_proj", "mlp.down_proj"]
    for statistics in collect(walk, names, dense, pause=pause).values():
        assert statistics.hessian.is_cuda
    advance(walk)
    assert batch.hidden.is_cuda
    for statistics in collect_relative(walk, names).values():
        assert statistics.hessian.is_cuda


@torch.no_grad()
def test_a_block_is_tuned_there(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build without CUDA cannot go back through the block; that PyTorch does it there is given.
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, inputs: [torch.zeros_like(one) for one in inputs]
    )
    block, batch = _block_and_batch()
    dense, beside = _block_and_batch()
    visit = Visit(
        index=0,
        structure=BlockStructure("", ()),
        block=block,
        walk=Walk(0, block, [batch]),
        dense=Walk(0, dense, [beside]),
        dtypes={name: torch.bfloat16 for name, _ in block.named_parameters()},
        can_wait=True,
        clock=Clock(),
    )
    fake_cuda.counts = 1  # of weights that are not zero
    before = fake_cuda.reads
    tune(visit, ["mlp.down_proj", "self_attn.o_proj"], 1)
    once = fake_cuda.reads - before
    dense, beside = _block_and_batch()
    visit = dataclasses.replace(visit, dense=Walk(0, dense, [beside]))
    tune(visit, ["mlp.down_proj", "self_attn.o_proj"], 3)
    assert fake_cuda.reads - before - once == once  # no step is waited for


def test_perplexity_is_measured_there(fake_cuda: FakeCuda) -> None:
    logits = torch.randn(12, 50, device=CUDA)
    segments = torch.zeros(3, 12, dtype=torch.int64)
    perplexity_of(losses_of(lambda ids: torch.split(logits, 5)), segments)
    assert fake_cuda.reads == 1  # at the end


def _block_and_batch() -> tuple[torch.nn.Module, LoadedInputs]:
    """A block on the GPU, and a batch whose other arguments are the host's."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    with CUDA:
        block = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    positions = torch.arange(9)[None]
    embeddings = LlamaRotaryEmbedding(config)(torch.zeros(4, 9, 32), positions)
    mask = torch.zeros(4, 1, 9, 9)
    arguments = Arguments((), {"position_embeddings": embeddings, "attention_mask": mask})
    return block, LoadedInputs(torch.randn(4, 9, 32, device=CUDA), [arguments])


@pytest.mark.parametrize("preset", methods.PRESET_NAMES)
def test_one_layer_is_solved_there_by_a_preset(fake_cuda: FakeCuda, preset: str) -> None:
    assert solve_by_preset(problem(), SemiStructured(2, 4), preset=preset).weight.is_cuda
