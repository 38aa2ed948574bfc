"""Memory for the KV cache, on the device that a graph runs on.

Every operation on a cache copies or clears lines of equal length at equal distances, which the CUDA
runtime calls a 2D copy. So the host and a GPU differ in four small methods only, and neither
PyTorch nor a package with CUDA bindings is needed: `libcudart` is there wherever ONNX Runtime runs
on CUDA, because its CUDA provider is linked against it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.floats import Float
from thanos_deploy.errors import PlatformError

# cudaMemcpyKind, of the CUDA runtime's API.
_DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 2, 3


@dataclass(frozen=True, slots=True)
class Lines:
    """Pieces of memory of equal length at equal distances.

    Attributes:
        address: address of the first line.
        count: number of lines.
        length: length of a line, in bytes.
        pitch: distance from the beginning of a line to the beginning of the next, in bytes.
    """

    address: int
    count: int
    length: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous tensor [batch, heads, tokens, dim], or of any shape if `lines` is not used.

    Attributes:
        address: address of the first value.
        shape: the sizes of its axes.
        type: type of the values.
        owner: the object that owns the memory, which is kept alive with the tensor.
    """

    address: int
    shape: tuple[int, ...]
    type: Float
    owner: object = field(repr=False)

    def lines(self, rows: range, tokens: range) -> Lines:
        """The memory of some tokens of some sequences: one line for each head of each sequence."""
        _, heads, length, dim = self.shape
        token = dim * self.type.bytes
        line = length * token
        return Lines(
            self.address + rows.start * heads * line + tokens.start * token,
            len(rows) * heads,
            len(tokens) * token,
            line,
        )


class Memory(Protocol):
    """Memory of a device; all methods are synchronous.

    Attributes:
        device: name of the device in ONNX Runtime.
    """

    device: str

    def allocate(self, values: int, type: Float) -> Tensor:  # as in `Tensor`
        """Allocate a flat tensor of at least `values` values, which are undefined (even NaN)."""

    def copy(self, target: Lines, source: Lines) -> None:
        """Copy lines to as many lines of the same length, which must not overlap with them."""

    def zero(self, target: Lines) -> None:
        """Set every byte of the lines to 0."""

    def read(self, source: Lines) -> NDArray[np.uint8]:
        """Copy lines to the host: uint8[count, length]."""


class HostMemory:
    """Memory of the host; see `Memory`."""

    device = "cpu"

    def allocate(self, values: int, type: Float) -> Tensor:
        """See `Memory.allocate`; the system provides pages only when they are written to."""
        array = np.empty(max(values, 1), type.bits)
        return Tensor(array.ctypes.data, array.shape, type, array)

    def copy(self, target: Lines, source: Lines) -> None:
        """See `Memory.copy`."""
        _on_host(target)[:] = _on_host(source)

    def zero(self, target: Lines) -> None:
        """See `Memory.zero`."""
        _on_host(target)[:] = 0

    def read(self, source: Lines) -> NDArray[np.uint8]:
        """See `Memory.read`."""
        return _on_host(source).copy()


def _on_host(lines: Lines) -> NDArray[np.uint8]:
    """Return a view of the lines as uint8[count, length]."""
    shape = (lines.count, lines.length)
    if 0 in shape:
        return np.zeros(shape, np.uint8)
    span = (lines.count - 1) * lines.pitch + lines.length
    memory = memoryview((ctypes.c_uint8 * span).from_address(lines.address))
    return np.ndarray(shape, np.uint8, memory, strides=(lines.pitch, 1))


class CudaMemory:
    """Memory of the first GPU that this process sees; see `Memory`.

    A graph runs on a stream of ONNX Runtime's own, which does not wait for copies on the default
    stream; so every method waits for its own work.
    """

    device = "cuda"

    def __init__(self, ort: Any, cudart: Any) -> None:
        """Declare the functions of libcudart that are used.

        Args:
            ort: the module `onnxruntime`, which allocates the memory.
            cudart: libcudart, loaded by `ctypes.CDLL`.
        """
        self._ort = ort
        self._cudart = cudart
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        cudart.cudaMemcpy2D.argtypes = [pointer, size, pointer, size, size, size, number]
        cudart.cudaMemset2D.argtypes = [pointer, size, number, size, size]
        cudart.cudaGetErrorName.argtypes = [number]
        cudart.cudaGetErrorName.restype = ctypes.c_char_p

    def allocate(self, values: int, type: Float) -> Tensor:
        """See `Memory.allocate`; at least one value, so that an empty cache has an address too."""
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(
            [max(values, 1)], type.onnx, self.device, 0
        )
        return Tensor(value.data_ptr(), tuple(value.shape()), type, value)

    def copy(self, target: Lines, source: Lines) -> None:
        """See `Memory.copy`."""
        self._copy(target, source, _DEVICE_TO_DEVICE)

    def zero(self, target: Lines) -> None:
        """See `Memory.zero`."""
        if target.count and target.length:
            cudart = self._cudart
            self._do(
                cudart.cudaMemset2D, target.address, target.pitch, 0, target.length, target.count
            )

    def read(self, source: Lines) -> NDArray[np.uint8]:
        """See `Memory.read`."""
        array = np.empty((source.count, source.length), np.uint8)
        target = Lines(array.ctypes.data, source.count, source.length, source.length)
        self._copy(target, source, _DEVICE_TO_HOST)
        return array

    def _copy(self, target: Lines, source: Lines, kind: int) -> None:
        if source.count and source.length:
            self._do(
                self._cudart.cudaMemcpy2D,
                target.address,
                target.pitch,
                source.address,
                source.pitch,
                source.length,
                source.count,
                kind,
            )

    def _do(self, call: Callable[..., int], *arguments: int) -> None:
        code = call(*arguments) or self._cudart.cudaStreamSynchronize(None)
        if code:
            name = self._cudart.cudaGetErrorName(code).decode()
            raise PlatformError(
                f"CUDA: {name} while the KV cache was copied",
                fix="free memory on the GPU, or serve with fewer --slots"
                if "Memory" in name
                else "check the driver with nvidia-smi, and report this error if the driver works",
            )


def open_cuda(ort: Any) -> CudaMemory:
    """Return the memory of the first GPU, after a session has loaded the CUDA provider.

    Raises:
        PlatformError: the CUDA runtime cannot be loaded.
    """
    name = f"libcudart.so.{ort.cuda_version.partition('.')[0]}"
    try:
        return CudaMemory(ort, ctypes.CDLL(name))
    except OSError as error:
        raise PlatformError(
            f"the CUDA runtime that onnxruntime-gpu is built for is not usable ({error})",
            fix="pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ) from error
