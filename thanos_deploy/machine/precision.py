"""The precision of matrix products: float32 factors, or rounded ones, which can be faster."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")

# The first GPUs with bfloat16 and TF32 tensor cores.
_AMPERE = (8, 0)


def multiplies_bfloat16(device: torch.device = _CPU) -> bool:
    """This device multiplies bfloat16 numbers itself; float32 ones take it longer."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    capabilities = torch.cpu.get_capabilities()
    # As x86 and Arm call it.
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices with factors that may be rounded to a dtype, and float32 sums.

    For bfloat16, processors round factors to bfloat16 (8 significant bits) and GPUs to TF32 (11),
    because PyTorch lets cuBLAS round float32 factors to nothing else. So a GPU is at least as
    exact, and on either device products of numbers that were bfloat16 already lose nothing. For
    float32 nothing is rounded, whatever the process was set to before ("ieee").

    Rounded only where that is faster. Products of other dtypes than float32 are as they are:
    factorisations, which are in float64, never change.

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
    """Have one backend multiply in a precision."""
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
