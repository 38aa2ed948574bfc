"""Compile the CUDA C++ files of this folder on first use for the GPU at hand, and launch kernels.

NVRTC compiles them. It comes with CUDA builds of PyTorch, so no CUDA toolkit is needed.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.errors import PlatformError

FOLDER = Path(__file__).parent

# Values of enumerations in cuda.h.
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_TENSOR_MAP_UINT16 = 1
_SWIZZLES = {64: 2, 128: 3}
_L2_PROMOTION_128B = 2

_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64

Grid = tuple[int, int, int]
TensorMap = ctypes.Array[ctypes.c_char]
# Launches a kernel on a grid; its arguments are tensors and tensor maps, and numbers after them.
Launch = Callable[[Grid, Sequence[Tensor | TensorMap | None], Sequence[int]], None]


def target(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for, such as "sm_80"; Hopper needs sm_90a for wgmma.

    Raises:
        PlatformError: a GPU of this compute capability has no sparse tensor cores.
    """
    major, minor = capability
    if major < 8:
        raise PlatformError(
            f"this GPU has compute capability {major}.{minor}, whose tensor cores do not "
            "support 2:4 weights",
            fix="use a GPU of compute capability 8.0 or later, or another variant",
        )
    return f"sm_{major}{minor}{'a' if capability == (9, 0) else ''}"


def compile(source: str, architecture: str, nvrtc: ctypes.CDLL) -> bytes:
    """Compile a source file of this folder to a cubin.

    Args:
        source: name of the file.
        architecture: see `target`.
        nvrtc: the library NVRTC.

    Raises:
        PlatformError: the file does not compile, and the message has the compiler's log; or NVRTC
            fails otherwise.
    """
    headers = sorted(FOLDER.glob("*.cuh"))
    strings = ctypes.c_char_p * len(headers)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def require(code: int, what: str) -> None:
        if code:
            raise PlatformError(
                f"{source}: NVRTC could not {what} for {architecture} (code {code})",
                fix="report this with the versions of PyTorch and the driver",
            )

    require(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            (FOLDER / source).read_bytes(),
            source.encode(),
            len(headers),
            strings(*(path.read_bytes() for path in headers)),
            strings(*(path.name.encode() for path in headers)),
        ),
        "create a program",
    )
    try:
        options = (ctypes.c_char_p * 2)(f"-arch={architecture}".encode(), b"-std=c++17")
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise PlatformError(
                f"{source} does not compile for {architecture}: {log.value.decode()}",
                fix="use PyTorch for CUDA 12.5 or later and a GPU of compute capability 8.0 or "
                "later, or another variant",
            )
        require(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "tell the size of the code")
        cubin = ctypes.create_string_buffer(size.value)
        require(nvrtc.nvrtcGetCUBIN(program, cubin), "return the code")
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def kernel(device: int, source: str, name: str, threads: int, shared_bytes: int) -> Launch:
    """Compile a kernel for a device, and return the function that launches it.

    A CUDA graph can capture everything but the first call for a source and a name.

    Args:
        device: index of the device, which must be the current one.
        source: name of the source file.
        name: name of the kernel.
        threads: threads of a block.
        shared_bytes: bytes of dynamic shared memory of a block.

    Raises:
        PlatformError: the kernel cannot be compiled or loaded here.
    """
    cuda = _library("libcuda.so.1")
    function = ctypes.c_void_p()
    _check(
        cuda,
        cuda.cuModuleGetFunction(ctypes.byref(function), _module(device, source), name.encode()),
    )
    _check(
        cuda,
        cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
    )

    def launch(
        grid: Grid, arrays: Sequence[Tensor | TensorMap | None], numbers: Sequence[int]
    ) -> None:
        values = [*map(_value, arrays), *map(ctypes.c_int, numbers)]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            cuda,
            cuda.cuLaunchKernel(
                function, *grid, threads, 1, 1, shared_bytes, stream, pointers, None
            ),
        )

    return launch


def tensor_map(matrix: Tensor, box_rows: int, box_columns: int) -> TensorMap:
    """Make a TMA descriptor of a matrix, for copies of boxes with zeros outside the matrix.

    Args:
        matrix: [rows, columns] of 16-bit entries, contiguous, every row aligned to 16 bytes.
        box_rows, box_columns: size of a box; it has 32 or 64 columns, and its pieces of 16 bytes
            are swizzled.

    Raises:
        PlatformError: the driver does not take the matrix or the box.
    """
    cuda = _library("libcuda.so.1")
    rows, columns = matrix.shape
    # The driver wants the descriptor aligned.
    space = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(space) % _TENSOR_MAP_ALIGNMENT
    result = (ctypes.c_char * _TENSOR_MAP_BYTES).from_buffer(space, offset)
    _check(
        cuda,
        cuda.cuTensorMapEncodeTiled(
            result,
            _TENSOR_MAP_UINT16,
            2,
            ctypes.c_void_p(matrix.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(columns * matrix.element_size()),
            (ctypes.c_uint32 * 2)(box_columns, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            _SWIZZLES[box_columns * matrix.element_size()],
            _L2_PROMOTION_128B,
            0,
        ),
    )
    return result


@cache
def _module(device: int, source: str) -> ctypes.c_void_p:
    assert torch.version.cuda is not None
    architecture = target(torch.cuda.get_device_capability(device))
    nvrtc = _library(f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}")
    cuda = _library("libcuda.so.1")
    cubin = compile(source, architecture, nvrtc)
    module = ctypes.c_void_p()
    result = cuda.cuModuleLoadData(ctypes.byref(module), cubin)
    if result:
        raise not_loaded(source, architecture, cuda, result)
    return module


def not_loaded(source: str, architecture: str, cuda: ctypes.CDLL, result: int) -> PlatformError:
    """Return the error for a cubin that the driver refuses, with the versions of both."""
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return PlatformError(
        f"{source}, compiled for {architecture} by the toolkit of CUDA {torch.version.cuda}, is "
        f"refused by the driver, which is for CUDA {driver}: {_text(cuda, result)}",
        fix=f"install a driver for CUDA {torch.version.cuda} or later, or a PyTorch for CUDA "
        f"{driver} or earlier",
    )


def _value(array: Tensor | TensorMap | None) -> ctypes.c_void_p | TensorMap:
    if array is None or isinstance(array, Tensor):
        return ctypes.c_void_p(None if array is None else array.data_ptr())
    return array


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
        raise PlatformError(
            f"CUDA driver: {_text(cuda, result)}", fix="check the driver with nvidia-smi"
        )


def _text(cuda: ctypes.CDLL, result: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(result, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({result})"
