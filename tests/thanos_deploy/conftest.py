"""A GPU that computes nothing, for a machine that has none."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_READ = torch.ops.aten._local_scalar_dense.default

# A CPU build of PyTorch cannot call these on tensors that say that they are on a GPU, because it has
# nothing to switch to that GPU with; the operations themselves it can.
_AS_OPERATIONS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.item: _READ,
    Tensor.__bool__: lambda tensor: bool(_READ(tensor)),
    Tensor.__int__: lambda tensor: int(_READ(tensor)),
    Tensor.__float__: lambda tensor: float(_READ(tensor)),
}


class _AsOperations(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _AS_OPERATIONS.get(func, func)(*args, **(kwargs or {}))


class FakeCuda(FakeTensorMode):
    """Tensors have a shape, a dtype and a device, and no values; devices cannot be mixed.

    That is PyTorch's own check of every operation. What the host reads of a tensor is made up here,
    and counted: True, the number 0, or 1.0, which is what a layer without trouble would give.

    Attributes:
        reads: how many numbers the host has read from the GPU.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        self.reads = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a read; everything else is the base class's."""
        if func is _READ:
            self.reads += args[0].is_cuda
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0
        return super().dispatch(func, types, args, kwargs or {})


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """Within the test, tensors made on "cuda" are of a GPU that computes nothing."""
    with FakeCuda() as mode, _AsOperations():
        yield mode
