"""What matrix products multiply: float32 numbers, or bfloat16 ones, which can be faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def multiplies_bfloat16() -> bool:
    """This processor multiplies bfloat16 numbers itself; float32 ones take it longer."""
    capabilities = torch.cpu.get_capabilities()
    # As x86 and Arm call it.
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices with factors rounded to this dtype, and float32 sums.

    Rounded only where that is faster; other dtypes than float32 are as they are.

    Args:
        dtype: float32 or bfloat16.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = matmul.fp32_precision
    if dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
