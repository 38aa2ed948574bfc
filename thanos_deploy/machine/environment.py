"""The libraries, the processor and the memory behind a result. Standard library only."""

import ctypes
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from thanos_deploy import __version__
from thanos_deploy.bundle.codec import called

# glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger tensors are mapped from the system one by one, and go
# back to it when they are freed.
HEAP_TENSOR_BYTES = 32 << 20

# The libraries whose version can change a result.
_LIBRARIES = (
    "torch",
    "transformers",
    "triton",
    "tokenizers",
    "safetensors",
    "numpy",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime-gpu",
    "onnxruntime-genai-cuda",
    "scipy",
    "mlcommons-loadgen",
    "gguf",
)


@dataclass(frozen=True, slots=True)
class Environment:
    """The tool, its libraries and the machine.

    Attributes:
        thanos_deploy: version of this tool.
        python: version of Python.
        libraries: maps the name of each installed library that can change a result to its version.
        platform: the operating system.
        processor: model name of the processor.
        cores: number of cores that the process may use.
        memory_bytes: physical memory of the machine.
    """

    thanos_deploy: str = field(metadata=called("thanos-deploy"))
    python: str
    libraries: Mapping[str, str]
    platform: str
    processor: str
    cores: int
    memory_bytes: int


@cache
def describe() -> Environment:
    """Describe what this process runs on."""
    return Environment(
        thanos_deploy=__version__,
        python=platform.python_version(),
        libraries={name: version for name in _LIBRARIES if (version := _version(name))},
        platform=platform.platform(),
        processor=_processor(),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def cache_folder() -> Path:
    """The folder for files that can be made again.

    It is $THANOS_DEPLOY_CACHE if that is set, and otherwise a folder in the user's cache folder.
    """
    if own := os.environ.get("THANOS_DEPLOY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "thanos-deploy"


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far.

    Linux's VmHWM is preferred to getrusage, whose figure for a new process starts at the peak of
    its parent process.
    """
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def resident_memory_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not report it."""
    return _status_bytes("VmRSS")


def return_freed_memory(*, at_least: int = 0) -> None:
    """Make glibc return freed heap memory to the system; with another C library, do nothing.

    Freed tensors of up to `HEAP_TENSOR_BYTES` leave holes in glibc's heap, which stay resident
    until they are trimmed. Returning memory that is needed again soon costs time.

    Args:
        at_least: bytes. If it is not 0, do nothing where less has been freed, or where the C
            library cannot report how much has been freed.
    """
    with suppress(OSError, AttributeError):
        if not at_least or _freed_bytes() >= at_least:
            ctypes.CDLL(None).malloc_trim(0)


def _freed_bytes() -> int:
    """Bytes freed in the main thread's heap that glibc has kept.

    Raises:
        OSError, AttributeError: the C library is not glibc, or older than glibc 2.33.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer; `fordblks` is the number of free bytes."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
