"""y = x W^T + b for several tokens with W 2:4: a Triton kernel that unpacks W in registers.

Triton has no `mma.sp`, so this kernel saves bandwidth and memory of the weights (it reads 9/16 of
their bytes) but no multiplications: it puts the zeros back into a tile in registers, and dense
tensor cores multiply the tile. For up to 16 tokens, whatever their number, that takes 24 to 32
instructions for a group of four columns. An H100 has time for 40 while it reads the group; see
`decode`. Few tokens have few tiles, so the columns are divided among blocks; see `split_k`.

The columns of a group are, by the bits of its mask:

    0   bit 0 ? first : 0                        2   bit 2 ? (bit 3 ? first : second) : 0
    1   bit 1 ? (bit 0 ? second : first) : 0     3   bit 3 ? second : 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels import split_k
from runtime.kernels.decode import bench, tunable
from runtime.kernels.packed import PackedWeight

MOST_TOKENS_AT_ONCE = 128

# A tile for tensor cores has at least 16 rows.
LEAST_TOKENS_AT_ONCE = 16

# Rows of the smallest tile in `CONFIGS`; the number of splits is chosen for it.
_ROWS = 64

CONFIGS = [
    triton.Config({"BLOCK_N": rows, "BLOCK_U": units}, num_warps=warps, num_stages=stages)
    for rows, units, warps, stages in [
        (64, 8, 4, 4),
        (128, 8, 8, 3),
        (128, 4, 4, 4),
    ]
]


@triton.jit
def group(words, bits, slot: tl.constexpr):
    """One of the two groups of 8 columns: the bits of its two values (uint16), and its mask."""
    pair = words >> (32 * slot)
    return (
        (pair & 0xFFFF).to(tl.uint16),
        ((pair >> 16) & 0xFFFF).to(tl.uint16),
        (bits >> (4 * slot)) & 0xF,
    )


@triton.jit
def columns(words, bits, slot: tl.constexpr):
    """The four columns of one of the two groups of 8 columns, as bits (uint16)."""
    first, second, kept = group(words, bits, slot)
    zero = tl.zeros_like(first)
    return (
        tl.where(kept & 1 != 0, first, zero),
        tl.where(kept & 2 != 0, tl.where(kept & 1 != 0, second, first), zero),
        tl.where(kept & 4 != 0, tl.where(kept & 8 != 0, first, second), zero),
        tl.where(kept & 8 != 0, second, zero),
    )


@triton.autotune(configs=tunable(CONFIGS), key=["outputs", "inputs", "BLOCK_M"], do_bench=bench)
@triton.jit
def kernel(
    x,
    words,
    mask,
    bias,
    y,
    tokens,
    outputs,
    inputs,
    words_per_row,
    words_per_split,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Multiply BLOCK_M tokens with BLOCK_N rows of the weight, BLOCK_U words of a row at a time.

    y is [splits, tokens, outputs]; a block sums `words_per_split` words of each of its rows.
    """
    # Consecutive programs share rows of the weight, and all of x stays in the L2 cache.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    # 64 bits: tokens * inputs may pass 2^31.
    row_m = m.to(tl.int64)[:, None] * inputs
    row_n = n.to(tl.int64)[:, None] * words_per_row
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = split * words_per_split
    for start in range(begin, min(begin + words_per_split, words_per_row), BLOCK_U):
        # Rows and splits are multiples of BLOCK_U words, so `u` needs no mask.
        u = start + tl.arange(0, BLOCK_U)
        inside = (n < outputs)[:, None]
        word = tl.load(words + row_n + u[None, :], mask=inside, other=0)
        bits = tl.load(mask + row_n + u[None, :], mask=inside, other=0)
        a0, a1, a2, a3 = columns(word, bits, 0)
        b0, b1, b2, b3 = columns(word, bits, 1)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        # [row, word, group, high bit of the column, low bit] -> [row, column]
        dense = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_U * 8))
        k = start * 8 + tl.arange(0, BLOCK_U * 8)
        read = (m < tokens)[:, None] & (k < inputs)[None, :]
        tile = tl.load(x + row_m + k[None, :], mask=read, other=0.0)
        sums = tl.dot(tile, tl.trans(dense.to(x.dtype.element_ty, bitcast=True)), sums)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    row_y = (split.to(tl.int64) * tokens + m)[:, None] * outputs
    tl.store(
        y + row_y + n[None, :],
        sums.to(y.dtype.element_ty),
        mask=(m < tokens)[:, None] & (n < outputs)[None, :],
    )


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, blocks: int | None = None
) -> Tensor:
    """Return x W^T + bias, summed in float32.

    Args:
        x: [tokens, inputs] in the weight's dtype.
        weight: [outputs, inputs].
        bias: [outputs].
        blocks: number of blocks that keep the GPU busy, for split-K; None for a number that fits
            the GPU.

    Returns:
        [tokens, outputs] in the weight's dtype.
    """
    y = weight.product(x, bias)
    tokens, inputs = x.shape
    block_m = min(max(LEAST_TOKENS_AT_ONCE, triton.next_power_of_2(tokens)), MOST_TOKENS_AT_ONCE)
    tiles_m = triton.cdiv(tokens, block_m)
    if blocks is None:
        # Blocks of 16 tokens are limited by memory, and four on a multiprocessor hide its latency.
        # Larger blocks compute more on the bytes that they read, and write more partial sums.
        blocks = split_k.processors(x.device) * max(1, 64 // block_m)
    words = weight.words.shape[1]
    per_split = split_k.words_per_split(words, tiles_m * triton.cdiv(weight.rows, _ROWS), blocks)
    splits = triton.cdiv(words, per_split)
    is_split = splits > 1
    out = x.new_empty(splits, tokens, weight.rows, dtype=torch.float32) if is_split else y
    has_bias = bias is not None and not is_split
    kernel[lambda tiles: (tiles_m, triton.cdiv(weight.rows, tiles["BLOCK_N"]), splits)](
        x.contiguous(),
        weight.words,
        weight.mask,
        bias if has_bias else y,
        out,
        tokens,
        weight.rows,
        inputs,
        words,
        per_split,
        HAS_BIAS=has_bias,
        BLOCK_M=block_m,
        enable_fp_fusion=True,  # Triton is about to change the default
    )
    if is_split:
        split_k.add(out, bias, y)
    return y
