"""What this machine has for each target, before any work is done: one line each, with a fix."""

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from exporters import _builder
from thanos_deploy import gpu
from thanos_deploy.check import Check
from thanos_deploy.errors import PlatformError

# ONNX Runtime's TensorRT provider is linked against one major version of TensorRT; so is its wheel.
_TENSORRT_OF_ONNXRUNTIME = {"1.31": "10"}

# Building the engine of a 0.27 GB graph peaked at 1.8 GB of host memory and left 0.31 GB on disk
# (TensorRT-RTX 1.7, two profiles); see benchmarks/LOG.md.
_MEMORY_PER_GRAPH_BYTE = 6.0
_DISK_PER_GRAPH_BYTE = 1.3

# The extra of each target's library.
_INSTALL = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}

_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def checks(*, graph_bytes: int | None = None, folder: Path | None = None) -> list[Check]:
    """Everything, from the packages to the GPU.

    Args:
        graph_bytes: size of the graph that an engine is to be built from; None to leave out what
            depends on it.
        folder: where the engine would be written; None likewise.
    """
    found = [
        _onnxruntime(),
        *(_library(target) for target in _INSTALL),
        _onnxruntime_tensorrt(),
        *_gpus(),
    ]
    if graph_bytes is not None and folder is not None:
        found += [_memory(graph_bytes), _disk(graph_bytes, folder)]
    return found


def of_target(target: str) -> list[Check]:
    """What an engine of a target needs of this machine: its library, and for TensorRT the GPU."""
    library = _library(target)
    return [library] if target == "tensorrt-rtx" else [library, *_gpus()]


def require(target: str) -> None:
    """Refuse what cannot be built here.

    Raises:
        PlatformError: something that the target needs is not there.
    """
    for check in of_target(target):
        if check.outcome != "PASS":
            raise PlatformError(f"{check.name}: {check.detail}", fix=check.fix)


def _onnxruntime() -> Check:
    installed = [name for name in _ONNXRUNTIMES if _version(name)]
    if installed == ["onnxruntime-gpu"]:
        return Check("ONNX Runtime", "PASS", f"onnxruntime-gpu {_version('onnxruntime-gpu')}")
    return Check(
        "ONNX Runtime",
        "FAIL",
        f"{' and '.join(installed) or 'no onnxruntime'} installed",
        fix="pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu: two of "
        "them overwrite each other's files",
    )


def _library(target: str) -> Check:
    try:
        module = _builder.load(target)
    except (ImportError, OSError) as error:
        fix = f"pip install 'thanos-deploy[{_INSTALL[target]}]'"
        return Check(f"target {target}", "SKIP", f"not usable ({error})", fix=fix)
    return Check(f"target {target}", "PASS", f"version {module.__version__}")


def _onnxruntime_tensorrt() -> Check:
    name = "ONNX Runtime with TensorRT"
    runtime = (_version("onnxruntime-gpu") or "").rpartition(".")[0]
    wanted = _TENSORRT_OF_ONNXRUNTIME.get(runtime)
    try:
        installed = _builder.load("tensorrt").__version__
    except (ImportError, OSError):
        return Check(name, "SKIP", "no TensorRT")
    if wanted is None or installed.split(".")[0] == wanted:
        return Check(name, "PASS", f"TensorRT {installed}, onnxruntime-gpu {runtime}")
    return Check(
        name,
        "FAIL",
        f"onnxruntime-gpu {runtime} is linked against TensorRT {wanted}, {installed} is installed",
        fix=f"pip install 'tensorrt<{int(wanted) + 1}' to use that provider; the target tensorrt "
        "itself takes either",
    )


def _gpus() -> Iterator[Check]:
    found = gpu.probe()
    if not found.gpus:
        yield Check(
            "GPU",
            "SKIP",
            found.problem,
            fix="use a machine with an NVIDIA GPU and its driver; tensorrt-rtx builds without one",
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


def _memory(graph_bytes: int) -> Check:
    status = Path("/proc/meminfo")
    if not status.exists():
        return Check("memory to build", "SKIP", "this system does not say how much is free")
    available = next(
        int(line.split()[1]) * 1024
        for line in status.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return _enough("memory to build", _MEMORY_PER_GRAPH_BYTE * graph_bytes, available)


def _disk(graph_bytes: int, folder: Path) -> Check:
    return _enough("disk", _DISK_PER_GRAPH_BYTE * graph_bytes, shutil.disk_usage(folder).free)


def _enough(name: str, needed: float, available: float) -> Check:
    fits = needed <= available
    return Check(
        name,
        "PASS" if fits else "FAIL",
        f"about {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB free",
        fix="" if fits else "free some, or use a larger machine",
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
