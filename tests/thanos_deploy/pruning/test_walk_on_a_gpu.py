"""The walk through a whole model on a GPU that computes nothing; see `FakeCuda`.

Files have no values either: reading one gives tensors of its shapes on the host, and what is
written to one comes from there. So what is made on the host in the middle of the work is found.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import MakeModel
from tests.thanos_deploy.conftest import FakeCuda
from thanos_deploy import methods
from thanos_deploy.calibration.activations import Place
from thanos_deploy.errors import ResourceError
from thanos_deploy.machine import background, devices
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.tensorfile import TensorFile
from thanos_deploy.model.widths import Widths
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.pruning import layers, owl
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Owl, Recipe
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit
from thanos_deploy.shrink.sizing import BlockPlan, Plan
from thanos_deploy.shrink.survey import survey

# Copying a module looks where its tensors lie, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

CUDA = torch.device("cuda", 0)
PATTERNS: tuple[Pattern, ...] = (
    SemiStructured(2, 4),
    SemiStructured(4, 8),
    Unstructured(0.5),
    Structured(0.25),
)


@pytest.fixture(autouse=True)
def _nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(file: TensorFile, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        dtype, shape = file.kinds[name]
        return torch.empty(shape, dtype=dtype).flatten()[start:stop]

    def write(file: TensorFile, name: str, tensor: Tensor, start: int = 0) -> None:
        assert tensor.dtype == file.kinds[name][0]

    def apply(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
        """What the library does with tensors that have values."""
        for child in module.children():
            child._apply(change)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                changed = nn.Parameter(change(parameter), parameter.requires_grad)
                module._parameters[name] = changed
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(TensorFile, "read", read)
    monkeypatch.setattr(TensorFile, "write", write)
    # Threads and streams are a matter of real GPUs.
    monkeypatch.setattr(background, "host_is_idle", lambda device: False)
    monkeypatch.setattr(devices, "wait", lambda device: None)


@pytest.fixture
def dense(make_model: MakeModel) -> Checkpoint:
    # Every operation is looked up without being computed, so that only their number costs time.
    return Checkpoint.open(make_model("llama", hidden_size=16, intermediate_size=24))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def segments() -> Tensor:
    return torch.zeros(4, 32, dtype=torch.int64)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("forward", ["fp32", "bf16"])
def test_a_model_is_pruned_there(
    dense: Checkpoint,
    tmp_path: Path,
    fake_cuda: FakeCuda,
    method: str,
    pattern: Pattern,
    forward: str,
) -> None:
    options: dict[str, Any] = {
        "method": method,
        "calib_forward": forward,
        "block_size": 8,
        "tune_steps": 2,
    }
    if method in ("wanda", "magnitude"):
        del options["block_size"]
    recipe = Recipe.of(pattern, preset="best", **options)
    blocks = prune(dense, segments(), made(tmp_path / "out"), recipe, device=CUDA, hold="disk")
    assert [len(block.layers) for block in blocks] == [7, 7]
    assert {layer.solver for block in blocks for layer in block.layers} == {method}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
def test_the_data_between_two_blocks_may_be_held(
    dense: Checkpoint, tmp_path: Path, fake_cuda: FakeCuda, place: Place
) -> None:
    recipe = Recipe.of(SemiStructured(2, 4), calib_forward="bf16")
    out = made(tmp_path / "out")
    assert len(prune(dense, segments(), out, recipe, device=CUDA, hold=place)) == 2


def test_a_gpu_without_memory_is_not_replaced_by_the_processor(
    dense: Checkpoint, tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.53 GiB. GPU 0 has")

    monkeypatch.setattr(layers, "prune_turn", full)
    out, recipe = made(tmp_path / "out"), Recipe.of(SemiStructured(2, 4), calib_forward="fp32")
    with pytest.raises(ResourceError, match=r"block 0: .* 1\.53 GiB was asked for") as caught:
        prune(dense, segments(), out, recipe, device=CUDA, hold="disk")
    assert caught.value.exit_code == 5
    for option in ("--seqlen", "--activations disk", "--preset fast", "--device cpu"):
        assert option in caught.value.fix


def test_outliers_are_counted_there(dense: Checkpoint, fake_cuda: FakeCuda) -> None:
    found = owl.survey(dense, segments(), dense.linears, Owl(), device=CUDA, hold="disk")
    assert len(found) == 2


@pytest.mark.slow
def test_a_model_is_cut_there(dense: Checkpoint, tmp_path: Path, fake_cuda: FakeCuda) -> None:
    assert len(survey(dense, segments(), device=CUDA, hold="disk")) == 2
    before = dense.widths[0]
    after = Widths(before.heads // 2, before.kv_heads // 2, before.channels // 2)
    plan = Plan((BlockPlan(before, after, 2, 1, 0.0),) * 2, stock=False)
    out = made(tmp_path / "out")
    blocks = shrink(dense, segments(), out, plan, Fit(), device=CUDA, hold="disk")
    assert [len(block.channels) for block in blocks] == [after.channels] * 2
