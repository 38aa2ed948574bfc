"""y = x W^T + b for one or two tokens, with W 2:4: a Triton kernel that reads 9/16 of W's bytes.

Decoding waits for the weights to come from memory, and 2:4 in 16 bits is 9/16 of them. Sparse
tensor cores would not help: they save multiplications, and nothing waits for those. Each kept value
picks its partner out of four inputs by two selects on the bits of the mask,

    first of the group    x[bit 0 ? 0 : bit 1 ? 1 : 2]
    second of the group   x[bit 3 ? 3 : bit 2 ? 2 : 1]

which takes no gather and no table.

All threads of a block lie along the columns: a thread holds 16 columns, and of those BLOCK_N rows
of W (a load of 16 bytes and one of 2 bytes each) and every token (two loads of 16 bytes each). So
the columns are split within the block already; 4 rows a block fill 256 blocks from 1024 rows, no
partial sums pass through memory, and the sum is the same each time. Tiles are [..., pairs of words,
2]: the last axis is what one load takes, and `tl.split` hands its two halves to the thread that
loaded them. Nothing moves through shared memory in the loop, so it has no barrier, and all loads of
W in an iteration are on their way before the first is used.

How many tokens the kernel is for follows from its instructions for a group of four columns, of
which an H100 (3.35 TB/s, 132 processors issuing 128 lanes at 1.755 GHz) has time for 40 while it
reads the group's 4.5 bytes: 20 for one token and 30 for two, but 48 for four, where the kernel in
`prefill` takes 26 for up to 16. `python -m benchmarks.kernel_resources` counts them.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.packed import PackedWeight, aligned

MOST_TOKENS = 2


# A tenth of Triton's own times: what the configurations differ in shows within a few runs.
bench = partial(triton.testing.do_bench, warmup=3, rep=10)


def tunable(configs: list[triton.Config]) -> list[triton.Config]:
    """The configurations to choose from by measuring; the interpreter can measure nothing."""
    return configs[:1] if triton.knobs.runtime.interpret else configs


CONFIGS = [
    triton.Config({"BLOCK_N": rows, "BLOCK_P": 32 * warps, "STAGES": stages}, num_warps=warps)
    for rows, warps, stages in [(8, 4, 1), (4, 4, 1), (4, 8, 1), (8, 4, 3)]
]


@triton.jit
def entry(word, at: tl.constexpr, dtype: tl.constexpr):
    """One of the four 16-bit numbers of an int64, float32."""
    return ((word >> (16 * at)) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def add_group(sums, x, word, bits, slot: tl.constexpr, dtype: tl.constexpr):
    """Add the products of four columns: x int64, and the first or second half of W's words."""
    x0 = entry(x, 0, dtype)[:, None, :]
    x1 = entry(x, 1, dtype)[:, None, :]
    x2 = entry(x, 2, dtype)[:, None, :]
    x3 = entry(x, 3, dtype)[:, None, :]
    first = entry(word, 2 * slot, dtype)[None]
    second = entry(word, 2 * slot + 1, dtype)[None]
    kept = (bits >> (4 * slot))[None]
    sums += first * tl.where(kept & 1 != 0, x0, tl.where(kept & 2 != 0, x1, x2))
    sums += second * tl.where(kept & 8 != 0, x3, tl.where(kept & 4 != 0, x2, x1))
    return sums


@triton.autotune(configs=tunable(CONFIGS), key=["outputs", "groups", "BLOCK_M"], do_bench=bench)
@triton.jit
def kernel(
    x,
    words,
    mask,
    bias,
    y,
    tokens,
    outputs,
    groups,
    pairs,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M tokens times BLOCK_N rows of the weight, BLOCK_P pairs of words of a row at a time.

    x is int64 [tokens, groups], four columns each; a row of the weight is `pairs` times 2 words.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    two = tl.arange(0, 2)[None, :]
    # 64 bits: a weight may have more than 2^31 entries.
    row_n = n.to(tl.int64)[:, None, None] * (2 * pairs)
    row_m = m.to(tl.int64)[:, None, None] * groups
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_P), tl.float32)
    for start in tl.range(0, pairs, BLOCK_P, num_stages=STAGES):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        at = row_n + (2 * p + two)[None]
        inside = (n < outputs)[:, None, None] & (p < pairs)[None]
        word0, word1 = tl.split(tl.load(words + at, mask=inside, other=0))
        bits0, bits1 = tl.split(tl.load(mask + at, mask=inside, other=0))
        group = 4 * p + two
        live = (m < tokens)[:, None, None]
        left = tl.load(x + row_m + group[None], mask=live & (group < groups)[None], other=0)
        group += 2
        right = tl.load(x + row_m + group[None], mask=live & (group < groups)[None], other=0)
        x0, x1 = tl.split(left)
        x2, x3 = tl.split(right)
        sums = add_group(sums, x0, word0, bits0, 0, dtype)
        sums = add_group(sums, x1, word0, bits0, 1, dtype)
        sums = add_group(sums, x2, word1, bits1, 0, dtype)
        sums = add_group(sums, x3, word1, bits1, 1, dtype)
    total = tl.sum(sums, axis=2)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m.to(tl.int64)[:, None] * outputs + n[None, :],
        total.to(dtype),
        mask=(m < tokens)[:, None] & (n < outputs)[None, :],
    )


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, summed in float32.

    Args:
        x: the weight's dtype [tokens, inputs].
        weight: [outputs, inputs].
        bias: [outputs].

    Returns:
        the weight's dtype [tokens, outputs].
    """
    tokens, inputs = x.shape
    assert (inputs, x.dtype) == (weight.columns, weight.dtype)
    assert bias is None or bias.is_contiguous()
    y = x.new_empty(tokens, weight.rows)
    groups = aligned(x).view(torch.int64)
    block_m = min(triton.next_power_of_2(tokens), MOST_TOKENS)
    kernel[
        lambda tiles: (triton.cdiv(weight.rows, tiles["BLOCK_N"]), triton.cdiv(tokens, block_m))
    ](
        groups,
        weight.words,
        weight.mask,
        y if bias is None else bias,
        y,
        tokens,
        weight.rows,
        groups.shape[1],
        weight.words.shape[1] // 2,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        enable_fp_fusion=True,  # Triton is about to change the default
    )
    return y
