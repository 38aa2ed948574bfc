"""y = x W^T + b with W 2:4 on sparse tensor cores: what `sparse_mma.cu` needs around it.

It is compiled on first use, for the GPU at hand, by NVRTC, which comes with CUDA builds of PyTorch;
no CUDA toolkit is needed.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.packed import DTYPES, require_dtype
from thanos_deploy.errors import PlatformError
from thanos_deploy.packing import to_cutlass

SOURCE = Path(__file__).with_suffix(".cu")

# As in the source.
_BLOCK_ROWS = 128
_BLOCK_TOKENS = 64
_BLOCK_COLUMNS = 64
_THREADS = 128

_NAMES = {dtype: f"sparse_linear_{str(dtype).removeprefix('torch.')}" for dtype in DTYPES}


@dataclass(frozen=True, slots=True, eq=False)
class SparseMmaWeight:
    """A 2:4 matrix, padded with zeros to whole blocks of the kernel.

    Attributes:
        values: [padded rows, padded columns / 2].
        metadata: int16[padded rows, padded columns / 16], in the order of `to_cutlass`.
        rows, columns: of the matrix itself.
    """

    values: Tensor
    metadata: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "SparseMmaWeight":
        """Pack a matrix, on the device where it is.

        Args:
            weight: one of `packed.DTYPES` [rows, columns], 2:4 along the columns.
            name: for the message.

        Raises:
            InputError: another dtype.
            ModelError: the weight is not 2:4.
        """
        require_dtype(weight, name)
        rows, columns = weight.shape
        padding = (0, -columns % _BLOCK_COLUMNS, 0, -rows % _BLOCK_ROWS)
        values, metadata = to_cutlass(torch.nn.functional.pad(weight.detach(), padding), name)
        return cls(values, metadata, rows, columns)


def linear(x: Tensor, weight: SparseMmaWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, summed in float32.

    Args:
        x: the weight's dtype [tokens, inputs], on a GPU.
        weight: [outputs, inputs].
        bias: the weight's dtype [outputs].

    Returns:
        the weight's dtype [tokens, outputs].

    Raises:
        PlatformError: the kernel cannot be compiled here.
    """
    tokens, inputs = x.shape
    assert (inputs, x.dtype) == (weight.columns, weight.values.dtype)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    rows, columns = weight.values.shape[0], 2 * weight.values.shape[1]
    y = x.new_empty(tokens, weight.rows)
    if inputs < columns:
        x = torch.nn.functional.pad(x, (0, columns - inputs))
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    with torch.cuda.device(x.device):
        _load(x.device.index, x.dtype)(
            (-(-tokens // _BLOCK_TOKENS), rows // _BLOCK_ROWS),
            [weight.values, weight.metadata, x, bias, y],
            [rows, columns, tokens, weight.rows],
        )
    return y


def target(capability: tuple[int, int]) -> str:
    """What to compile for on a GPU of a compute capability; only sm_90a has wgmma."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if capability == (9, 0) else ''}"


def compile(architecture: str, nvrtc: ctypes.CDLL) -> bytes:
    """The kernel as a cubin.

    Args:
        architecture: a `target`.
        nvrtc: the library.

    Raises:
        PlatformError: it does not compile, with the compiler's log.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None
    )
    try:
        options = (ctypes.c_char_p * 2)(f"-arch={architecture}".encode(), b"-std=c++17")
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise PlatformError(
                f"{SOURCE.name} does not compile for {architecture}: {log.value.decode()}",
                fix="use PyTorch for CUDA 12.5 or later and a GPU of compute capability 8.0 or "
                "later, or another variant",
            )
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


_Launch = Callable[[tuple[int, int], list[Tensor | None], list[int]], None]


@cache
def _load(device: int, dtype: torch.dtype) -> _Launch:
    """Compile for a device, which is the current one, and return what launches the kernel."""
    assert torch.version.cuda is not None
    nvrtc = _library(f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}")
    cuda = _library("libcuda.so.1")
    cubin = compile(target(torch.cuda.get_device_capability(device)), nvrtc)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda, cuda.cuModuleLoadData(ctypes.byref(module), cubin))
    name = _NAMES[dtype].encode()
    _check(cuda, cuda.cuModuleGetFunction(ctypes.byref(function), module, name))

    def launch(grid: tuple[int, int], tensors: list[Tensor | None], sizes: list[int]) -> None:
        values: list[Any] = [
            ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors
        ]
        values += [ctypes.c_int(size) for size in sizes]
        arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            cuda,
            cuda.cuLaunchKernel(function, *grid, 1, _THREADS, 1, 1, 0, stream, arguments, None),
        )

    return launch


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise PlatformError(
            f"{name} cannot be loaded ({error})",
            fix="install the NVIDIA driver and a CUDA build of PyTorch",
        ) from error


def _check(cuda: ctypes.CDLL, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(result, ctypes.byref(text))
        raise PlatformError(
            f"CUDA driver: {(text.value or b'unknown error').decode()} ({result})",
            fix="check the driver with nvidia-smi",
        )
