"""GPU data sheets: peak arithmetic, memory bandwidth and memory size, as the vendor publishes them.

Peaks are for dense matrix products on tensor cores, accumulated in float32, at the boost clock. A
sheet that states only figures "with sparsity" states twice the dense figures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from thanos_deploy.errors import UsageError

# Ratio of the 2:4 sparse peak to the dense peak, on every GPU below (L40S: rounded, its sheet has
# 2.02).
SPARSE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Datasheet:
    """The published figures of one GPU.

    Attributes:
        name: its name for `--gpu`.
        product: its name in NVIDIA's driver.
        peak: maps a dtype to dense floating-point (or integer) operations per second.
        bandwidth: memory bandwidth in bytes per second.
        memory: memory size in bytes.
        source: the document with these figures.
    """

    name: str
    product: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str


def _peaks(sixteen: float, int8: float, fp8: float | None = None) -> dict[str, float]:
    """Peaks by dtype, from TFLOPS; None for a dtype that the tensor cores do not support."""
    known = {"fp16": sixteen, "bf16": sixteen, "int8": int8, "fp8": fp8}
    return {dtype: value * 1e12 for dtype, value in known.items() if value is not None}


_A100 = _peaks(312, 624)
_H100 = _peaks(989.5, 1979, 1979)
_H100_PCIE = _peaks(756.5, 1513, 1513)
_SHEET = "NVIDIA {} Tensor Core GPU data sheet"
_ADA = "NVIDIA Ada GPU Architecture white paper, appendix A"

GPUS = (
    Datasheet("A10", "NVIDIA A10", _peaks(125, 250), 600e9, 24e9, _SHEET.format("A10")),
    Datasheet("A100", "NVIDIA A100-SXM4-80GB", _A100, 2039e9, 80e9, _SHEET.format("A100")),
    Datasheet("A100-PCIE", "NVIDIA A100 80GB PCIe", _A100, 1935e9, 80e9, _SHEET.format("A100")),
    Datasheet("A100-40GB", "NVIDIA A100-SXM4-40GB", _A100, 1555e9, 40e9, _SHEET.format("A100")),
    Datasheet(
        "A6000", "NVIDIA RTX A6000", _peaks(155, 310), 768e9, 48e9, "NVIDIA RTX A6000 data sheet"
    ),
    Datasheet("L4", "NVIDIA L4", _peaks(121, 242, 242), 300e9, 24e9, _SHEET.format("L4")),
    Datasheet("L40S", "NVIDIA L40S", _peaks(362, 733, 733), 864e9, 48e9, "NVIDIA L40S data sheet"),
    Datasheet("H100", "NVIDIA H100 80GB HBM3", _H100, 3350e9, 80e9, _SHEET.format("H100")),
    Datasheet("H100-PCIE", "NVIDIA H100 PCIe", _H100_PCIE, 2000e9, 80e9, _SHEET.format("H100")),
    Datasheet("H200", "NVIDIA H200", _H100, 4800e9, 141e9, _SHEET.format("H200")),
    Datasheet("RTX4090", "NVIDIA GeForce RTX 4090", _peaks(165, 661, 330), 1008e9, 24e9, _ADA),
)


def find(name: str) -> Datasheet:
    """Find the data sheet of a GPU by its `name` or its `product`.

    Only letters and digits of the name count, without regard to case.

    Raises:
        UsageError: the GPU is not in the table.
    """
    for gpu in GPUS:
        if _plain(name) in (_plain(gpu.name), _plain(gpu.product)):
            return gpu
    raise UsageError(
        f"GPU {name!r} is not known",
        fix=f"use one of {', '.join(gpu.name for gpu in GPUS)}, or add a row to "
        "thanos_deploy/forecast/datasheets.py",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
