"""Split-K for the Triton kernels: divide the columns of W among blocks, and add the partial sums.

A product with few tokens has too few tiles of outputs to keep a GPU busy, so several blocks share a
tile, and each sums a range of the columns. The partial sums go to a workspace in float32, and a
second small kernel adds them in the order of the ranges. So the result is deterministic, and a CUDA
graph can capture both kernels.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# A split has at least this many words, which are 256 columns: fewer are not worth a block.
_LEAST_WORDS = 32

_BLOCK = 256


def words_per_split(words: int, tiles: int, blocks: int) -> int:
    """Return the words of each row for one split, a multiple of `_LEAST_WORDS`.

    Args:
        words: number of words of a row.
        tiles: number of blocks without splitting.
        blocks: number of blocks that the GPU should get.
    """
    splits = max(1, blocks // tiles)
    return -(-words // (splits * _LEAST_WORDS)) * _LEAST_WORDS


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 where Triton's interpreter replaces it."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@triton.jit
def kernel(partial, bias, y, splits, entries, outputs, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum partial [splits, entries] over the splits, add the bias, and write y [entries]."""
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
    """Write the sum over the splits, plus the bias, to y.

    Args:
        partial: float32[splits, tokens, outputs].
        bias: [outputs]; None for no bias.
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
