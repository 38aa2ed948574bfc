"""A GPU that is simulated on the CPU: for the kernels in CUDA C++, and for what launches them."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from runtime.kernels import cuda_module, linears
from thanos_deploy.errors import PlatformError

_HERE = Path(__file__).parent

# An H100 runs both kernels.
_CAPABILITY, _MULTIPROCESSORS = (9, 0), 132


def compile(source: str, to: Path, *options: str) -> None:
    """Compile a source file of this folder, with the kernels that it includes.

    Raises:
        PlatformError: g++ is not installed.
    """
    if shutil.which("g++") is None:
        raise PlatformError(
            "g++ is not installed, and the GPU is simulated in C++", fix="install g++"
        )
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-I", str(cuda_module.FOLDER), *options]
    subprocess.run([*command, "-o", str(to), str(_HERE / source)], check=True)


@contextmanager
def card() -> Iterator[None]:
    """PyTorch says that it has an H100, for what asks it before a launch."""
    properties = SimpleNamespace(
        major=_CAPABILITY[0], minor=_CAPABILITY[1], multi_processor_count=_MULTIPROCESSORS
    )
    answers = {
        "device": nullcontext(),
        "get_device_properties": properties,
        "get_device_capability": _CAPABILITY,
        "get_device_name": "simulated",
        "current_stream": SimpleNamespace(cuda_stream=0),
    }
    with mock.patch.multiple(
        torch.cuda, **{name: mock.Mock(return_value=answer) for name, answer in answers.items()}
    ):
        yield


@contextmanager
def driver(folder: Path) -> Iterator[None]:
    """`mma-sp` takes tensors of the CPU; a simulated driver launches its kernels there.

    Args:
        folder: where the driver is compiled to.

    Raises:
        PlatformError: g++ is not installed.
    """
    library = folder / "libcuda.so"
    compile("simulated_driver.cpp", library, "-shared", "-fPIC")
    cuda, module = ctypes.CDLL(str(library)), ctypes.c_void_p()
    require = linears.require

    def require_others(maker: str, device: torch.device) -> None:
        if maker != "mma-sp":
            require(maker, device)

    with (
        card(),
        mock.patch.object(cuda_module, "_library", return_value=cuda),
        mock.patch.object(cuda_module, "_module", return_value=module),
        mock.patch.object(linears, "require", require_others),
    ):
        try:
            yield
        finally:
            cuda_module.kernel.cache_clear()
