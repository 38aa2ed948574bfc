"""Check, before any work, whether this machine has what each target needs; with a fix for each."""

import re
import shutil
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from exporters import targets
from exporters.target import Target
from exporters.targets import tensorrt, tensorrt_rtx
from thanos_deploy.check import Check
from thanos_deploy.errors import PlatformError
from thanos_deploy.gpu import driver as gpu

# Building the engine of a 0.27 GB graph peaked at 1.8 GB of host memory and left 0.31 GB on disk
# (TensorRT-RTX 1.7, two profiles); see benchmarks/LOG.md.
_MEMORY_PER_GRAPH_BYTE = 6.0
_DISK_PER_GRAPH_BYTE = 1.3

_CPU_ONLY, _WITH_CUDA = _ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_ON_CUDA = "ONNX Runtime on CUDA"


def checks(*, graph_bytes: int | None = None, folder: Path | None = None) -> list[Check]:
    """Check packages, GPUs and drivers, and the room for building an engine.

    Args:
        graph_bytes: size of the graph that an engine is to be built from; None to leave out the
            checks of memory and disk.
        folder: where the engine would be written; None likewise.
    """
    found = [
        *_onnxruntime(),
        *(check for target in targets.every() for check in _packages(target)),
        _onnxruntime_tensorrt(),
        *_gpus(),
        *_drivers(),
    ]
    if graph_bytes is not None and folder is not None:
        found += [_memory(graph_bytes), _disk(graph_bytes, folder)]
    return found


def of_target(target: Target[Any, Any]) -> list[Check]:
    """Check the packages that a target needs and, for a target that needs a GPU, the GPUs."""
    return [*_packages(target), *(_gpus() if target.gpu else ())]


def require(target: Target[Any, Any]) -> None:
    """Refuse a target that this machine cannot export to.

    Raises:
        PlatformError: something that the target needs is missing.
    """
    for check in of_target(target):
        if check.outcome != "PASS":
            raise PlatformError(f"{check.name}: {check.detail}", fix=check.fix)


def _onnxruntime() -> Iterator[Check]:
    """Check that exactly one package of ONNX Runtime is installed, and whether it supports CUDA."""
    installed = [name for name in _ONNXRUNTIMES if _version(name)]
    named = " and ".join(f"{name} {_version(name)}" for name in installed)
    match installed:
        case []:
            fix = f"pip install {_WITH_CUDA}"
            yield Check("ONNX Runtime", "SKIP", "not installed, so no graph can be run", fix)
        case [only]:
            yield Check("ONNX Runtime", "PASS", named)
            if only == _CPU_ONLY:
                yield Check(
                    _ON_CUDA,
                    "SKIP",
                    f"the package {_CPU_ONLY} is built for CPUs only",
                    fix=f"pip uninstall {_CPU_ONLY}, then pip install {_WITH_CUDA}",
                )
        case _:
            yield Check(
                "ONNX Runtime",
                "FAIL",
                f"{named} are installed and overwrite each other's files",
                fix=f"pip uninstall {' '.join(_ONNXRUNTIMES)}, then pip install {_WITH_CUDA}",
            )


def _packages(target: Target[Any, Any]) -> Iterator[Check]:
    """Check that the packages of a target are installed and can be imported."""
    for package in target.packages:
        try:
            module = package.load()
        except (ImportError, OSError) as error:
            yield Check(
                f"target {target.name}",
                "SKIP",
                f"not usable ({error})",
                fix=f"pip install 'thanos-deploy[{package.extra}]'",
            )
        else:
            version = getattr(module, "__version__", None)
            yield Check(
                f"target {target.name}", "PASS", f"version {version}" if version else "installed"
            )


def _onnxruntime_tensorrt() -> Check:
    """Check that the installed TensorRT has the major version that the provider is linked with."""
    name = "ONNX Runtime with TensorRT"
    try:
        installed = tensorrt.LIBRARY.package.load().__version__
    except (ImportError, OSError):
        return Check(name, "SKIP", "no TensorRT")
    found = f"TensorRT {installed}, {_WITH_CUDA} {_version(_WITH_CUDA)}"
    wanted = _linked_tensorrt()
    if wanted is None:
        return Check(
            name,
            "SKIP",
            f"{found}: it is unknown whether they fit together, because no TensorRT "
            "provider was found that names the version it needs",
            fix=f"pip install {_WITH_CUDA} if it is missing; `thanos-deploy gpu-check` tries the "
            "provider",
        )
    if installed.split(".")[0] == wanted:
        return Check(name, "PASS", found)
    return Check(
        name,
        "FAIL",
        f"{found}: that provider is linked against TensorRT {wanted}",
        fix=f"pip install 'tensorrt=={wanted}.*' to use that provider; the target tensorrt "
        "itself takes either",
    )


def _linked_tensorrt() -> str | None:
    """Major version of TensorRT that ONNX Runtime's provider is linked with; None without one."""
    package = util.find_spec("onnxruntime")
    if package is None or package.origin is None:
        return None
    provider = Path(package.origin).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not provider.exists():
        return None
    named = re.search(rb"libnvinfer\.so\.(\d+)", provider.read_bytes())
    return named and named[1].decode()


def _gpus() -> Iterator[Check]:
    found = gpu.probe()
    if not found.gpus:
        yield Check(
            "GPU",
            "SKIP",
            found.problem,
            fix="use a machine with an NVIDIA GPU and its driver; "
            f"{tensorrt_rtx.TARGET.name} builds without one",
        )
        return
    for number, device in enumerate(found.gpus):
        yield Check(
            f"GPU {number}",
            "PASS",
            f"{device.name}, {device.arch}, {device.memory_bytes / 1e9:.0f} GB, driver for CUDA "
            f"{found.cuda}",
        )
        yield Check(
            f"GPU {number}: sparse tensor cores",
            "PASS" if device.has_sparse_tensor_cores else "FAIL",
            f"compute capability {'.'.join(map(str, device.capability))}",
            fix=""
            if device.has_sparse_tensor_cores
            else "2:4 needs compute capability 8.0 or later; structured patterns are faster here",
        )


def _drivers() -> Iterator[Check]:
    """Check that the driver is new enough for the CUDA version that each library was built with."""
    found = gpu.probe()
    if found.cuda is None or not found.gpus:
        return
    in_torch, in_ort = _cuda_of_torch(), _cuda_of_ort()
    if in_torch is None:
        fix = "install a build of PyTorch for CUDA; https://pytorch.org/get-started has the command"
        yield Check("PyTorch on CUDA", "SKIP", "this build of PyTorch has no CUDA", fix)
    else:
        yield _driver("PyTorch on CUDA", in_torch, found.cuda)
    if in_ort is not None:
        yield _driver(_ON_CUDA, in_ort, found.cuda)


def _driver(name: str, built_with: str, driver: str) -> Check:
    """Check that a driver runs a library: same major version of CUDA, or an older one.

    With a newer minor version it runs machine code but refuses PTX (NVIDIA, "CUDA Compatibility").
    """
    wanted, has = (tuple(map(int, text.split(".")[:2])) for text in (built_with, driver))
    detail = f"built with CUDA {built_with}, the driver takes CUDA {driver}"
    if has >= wanted:
        return Check(name, "PASS", detail)
    if has[0] == wanted[0]:
        return Check(name, "PASS", f"{detail}: it runs machine code, but refuses newer PTX")
    return Check(
        name,
        "FAIL",
        detail,
        fix=f"install a driver for CUDA {wanted[0]}, or the library built for CUDA {has[0]}",
    )


def _cuda_of_torch() -> str | None:
    """Version of CUDA that PyTorch was built with; None for a build without CUDA."""
    import torch

    return torch.version.cuda


def _cuda_of_ort() -> str | None:
    """Version of CUDA of ONNX Runtime; None if it is not installed, or built without CUDA."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return getattr(onnxruntime, "cuda_version", None) or None


def _memory(graph_bytes: int) -> Check:
    status = Path("/proc/meminfo")
    if not status.exists():
        return Check("memory to build", "SKIP", "the free memory of this system cannot be read")
    available = next(
        int(line.split()[1]) * 1024
        for line in status.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    needed = _MEMORY_PER_GRAPH_BYTE * graph_bytes
    return _enough(
        "memory to build", needed, available, "free some memory, or use a larger machine"
    )


def _disk(graph_bytes: int, folder: Path) -> Check:
    needed, free = _DISK_PER_GRAPH_BYTE * graph_bytes, shutil.disk_usage(folder).free
    return _enough("disk", needed, free, "free some disk space, or move the bundle to another disk")


def _enough(name: str, needed: float, available: float, fix: str) -> Check:
    fits = needed <= available
    return Check(
        name,
        "PASS" if fits else "FAIL",
        f"about {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB free",
        fix="" if fits else fix,
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
