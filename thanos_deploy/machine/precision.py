"""Precision of matrix products: float32 factors, or factors rounded to fewer bits for speed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")

# The first GPUs with bfloat16 and TF32 tensor cores.
_AMPERE = (8, 0)


def multiplies_bfloat16(device: torch.device = _CPU) -> bool:
    """Whether the device has instructions for bfloat16 products, which are faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    capabilities = torch.cpu.get_capabilities()
    # The names on x86 and on Arm.
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices round their factors to a dtype; sums stay in float32.

    For bfloat16, CPUs round factors to bfloat16 (8 significant bits). GPUs round them to TF32 (11
    significant bits), because PyTorch lets cuBLAS round float32 factors to nothing else. So a GPU
    is at least as exact as a CPU, and on both, products of numbers that are bfloat16 already lose
    nothing. For float32 nothing is rounded ("ieee"), whatever the process's setting was before.

    A backend rounds only where that is faster. Products of dtypes other than float32 do not change,
    so factorisations, which are in float64, are not affected.

    Source: the precisions that each backend takes, `torch.backends` of PyTorch 2.11 and 2.13.

    Args:
        dtype: float32 or bfloat16.
    """
    rounded = dtype is torch.bfloat16
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    with ExitStack() as stack:
        stack.enter_context(_set(mkldnn, "bf16" if rounded else "ieee"))
        stack.enter_context(_set(torch.backends.cuda.matmul, "tf32" if rounded else "ieee"))
        yield


@contextmanager
def _set(matmul: Any, precision: str) -> Iterator[None]:
    """Set the float32 precision of one backend's matrix products, and restore it afterwards."""
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
