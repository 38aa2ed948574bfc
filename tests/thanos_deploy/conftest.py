"""A GPU that computes nothing, for a machine that has none."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_ATEN = torch.ops.aten
_READ = _ATEN._local_scalar_dense.default

# Numbers of device types in c10/core/DeviceType.h.
_CUDA, _META, _TYPES = 1, 14, 20


@contextmanager
def _switching_to_cuda_does_nothing() -> Iterator[None]:
    """Give a CPU build what CUDA builds without a GPU have within `FakeTensorMode`.

    Before most operations PyTorch switches to the tensor's device, by an object that only CUDA
    builds register for GPUs. That of "meta", where there is nothing to switch to, serves as well.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


class FakeCuda(FakeTensorMode):
    """Tensors have a shape, a dtype and a device, and no values; devices cannot be mixed.

    That is PyTorch's own check of every operation. What the host reads of a tensor is made up here,
    and counted: True, 1.0, or a count of 0, which is what a layer without trouble would give. Of
    what is marked or unique in a vector there is half; to learn how many is a read as well.

    Attributes:
        counts: what integers are read as.
        reads: how many numbers the host has read from the GPU.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        self.reads, self.counts = 0, 0

    def __deepcopy__(self, memo: object) -> "FakeCuda":
        return self  # what is copied with a tensor

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a read; everything else is the base class's."""
        if func is _READ:
            self.reads += args[0].is_cuda
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else self.counts
        if func is _ATEN.nonzero.default and args[0].ndim == 1:
            return self._half(args[0])[:, None]
        if func is _ATEN._unique2.default and args[0].ndim == 1:
            return (self._half(args[0]),) * 3
        if func is _ATEN.index.Tensor:
            tensor, indices = args
            args = (
                tensor,
                [
                    self._half(one) if one is not None and one.dtype is torch.bool else one
                    for one in indices
                ],
            )
        return super().dispatch(func, types, args, kwargs or {})

    def _half(self, vector: Tensor) -> Tensor:
        self.reads += vector.is_cuda
        with self:
            return torch.arange(len(vector) // 2, device=vector.device)


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """Within the test, tensors made on "cuda" are of a GPU that computes nothing."""
    with _switching_to_cuda_does_nothing(), FakeCuda() as mode:
        yield mode
