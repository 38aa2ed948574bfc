"""The GPU that is measured, and its peak rates."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from statistics import median

import torch

from runtime.kernels import timing
from thanos_deploy.gpu import driver, nvml
from thanos_deploy.gpu.rows import Card, Peaks, Row
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.machine import environment


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the copy and of the matrix product that measure the peak rates.

    Attributes:
        copy_bytes: bytes to copy, far more than any cache holds.
        gemm: rows and columns of the square matrices.
        samples: number of timed runs of each.
    """

    copy_bytes: int = 4 << 30
    gemm: int = 8192
    samples: int = 20


def rows(command: str, task: Task) -> Iterator[Row]:
    """Yield the record of the GPU.

    Args:
        command: command that repeats the measurement.
        task: see `steps.Task`.
    """
    yield describe(task.device, command)


def peak_rows(sizes: Sizes, task: Task) -> Iterator[Row]:
    """Yield the measured peak rates of the GPU."""
    yield peaks(sizes, task.device)


def describe(device: str, command: str) -> Card:
    """Describe the device, its driver and the versions of the libraries."""
    date = datetime.now(UTC).date().isoformat()
    on_gpu = device == "cuda"
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    found = nvml.Monitor.probe() if on_gpu else None
    limits = None if found is None else found.limits()
    memory = properties.total_memory if properties else environment.describe().memory_bytes
    assert isinstance(memory, int)
    return Card(
        name=properties.name if properties else environment.describe().processor,
        device=device,
        capability=(properties.major, properties.minor) if properties else (0, 0),
        memory_bytes=memory,
        driver=None if limits is None else limits.driver,
        driver_cuda=driver.probe().cuda,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        triton=_version("triton"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        power_limit_watts=None if limits is None else limits.power_watts,
        most_clock_hz=None if limits is None else limits.clock_hz,
        date=date,
        command=command,
    )


def peaks(sizes: Sizes, device: str) -> Peaks:
    """Measure the rates of a copy, and of a product of random square matrices in bf16."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _median(partial(target.copy_, source), sizes.samples)
    del source, target
    left, right = (
        torch.randn(sizes.gemm, sizes.gemm, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    product = _median(partial(torch.mm, left, right), sizes.samples)
    return Peaks(
        copy_bytes_per_second=2 * sizes.copy_bytes / copy,
        gemm_dtype="bf16",
        gemm_size=sizes.gemm,
        gemm_flops_per_second=2 * sizes.gemm**3 / product,
    )


def _median(call: Callable[[], object], samples: int) -> float:
    """Return the median time of one call, in seconds."""
    call()  # libraries initialise themselves in the first call
    return median(timing.replayed([call], samples=samples, warmup=3))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
