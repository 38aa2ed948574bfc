"""Split-K: the columns of a product divided among blocks, and their partial sums added.

A product with few tokens has too few tiles of outputs to keep a GPU busy, so several blocks share a
tile and each sums a range of the columns. Their sums go to a workspace in float32, and a second
small kernel adds them in the order of the ranges: the result is the same each time, and both can be
captured in a CUDA graph.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fewer words than these, 256 columns, are not worth a block of their own.
_LEAST_WORDS = 32

_BLOCK = 256


def words_per_split(words: int, tiles: int, blocks: int) -> int:
    """How many words of each row a block takes, a multiple of `_LEAST_WORDS`.

    Args:
        words: of a row.
        tiles: blocks that there are without splitting.
        blocks: that the GPU should have.
    """
    splits = max(1, blocks // tiles)
    return -(-words // (splits * _LEAST_WORDS)) * _LEAST_WORDS


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where Triton's interpreter stands in for it."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@triton.jit
def kernel(partial, bias, y, splits, entries, outputs, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum partial [splits, entries] and the bias to y [tokens, outputs], of as many entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial + at, mask=inside, other=0.0)
        partial += entries
    if HAS_BIAS:
        total += tl.load(bias + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def add(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the sum of the splits, plus the bias, to y.

    Args:
        partial: float32[splits, tokens, outputs].
        bias: [outputs].
        y: [tokens, outputs].
    """
    kernel[(triton.cdiv(y.numel(), _BLOCK),)](
        partial,
        y if bias is None else bias,
        y,
        len(partial),
        y.numel(),
        y.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK=_BLOCK,
    )
