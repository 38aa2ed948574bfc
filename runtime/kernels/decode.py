"""y = x W^T + b for one token with W 2:4: a Triton kernel that reads 9/16 of W's bytes.

Decoding is limited by reading the weights from memory, and a 2:4 weight in 16 bits has 9/16 of the
dense bytes. Sparse tensor cores would not help: they save multiplications, which are not the
bottleneck. Each kept value picks its input out of four by two selects on the bits of the mask,

    first of the group    x[bit 0 ? 0 : bit 1 ? 1 : 2]
    second of the group   x[bit 3 ? 3 : bit 2 ? 2 : 1]

without a gather or a table.

All threads of a block lie along the columns. A thread holds 16 columns of each of `ROWS` rows of W
(a load of 16 bytes and one of 2 for each row) and of x (two loads of 16 bytes). So the columns are
already divided within the block: 1024 rows fill 256 blocks, no partial sums pass through memory,
and the result is deterministic.

Tiles are [pairs of words, 2]: one load takes the last axis, and `tl.split` gives its halves to the
thread that loaded them. Rows are not an axis of a tile, because the way Triton distributes a tile
of three axes among threads changed between its versions, and tiles with different distributions are
exchanged through shared memory. As it is, the loop has no barrier, and all loads of W in an
iteration are issued before the first is used.

The kernel is for one token only, because of the instructions that a group of four columns takes. An
H100 (3.35 TB/s, 132 processors issuing 128 lanes at 1.755 GHz) has time for 40 while it reads the
group's 4.5 bytes. One token takes 22, two tokens would take some 30, and four tokens 48, where the
kernel in `prefill` takes 24 to 32 for up to 16 tokens. `python -m benchmarks.kernel_resources`
counts them.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.packed import PackedWeight, aligned

MOST_TOKENS = 1

# Rows of W in a block.
ROWS = 4

# Milliseconds, a tenth of Triton's defaults: a few runs show how the configurations differ.
bench = partial(triton.testing.do_bench, warmup=3, rep=10)


def tunable(configs: list[triton.Config]) -> list[triton.Config]:
    """Return the configurations to tune over: one in the interpreter, which cannot measure."""
    return configs[:1] if triton.knobs.runtime.interpret else configs


CONFIGS = [
    triton.Config({"BLOCK_P": 32 * warps, "STAGES": stages}, num_warps=warps)
    for warps, stages in [(4, 1), (8, 1), (4, 3)]
]


@triton.jit
def entry(word, at: tl.constexpr, dtype: tl.constexpr):
    """One of the four 16-bit numbers of an int64, as float32."""
    return ((word >> (16 * at)) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def add_group(sums, x, word, bits, slot: tl.constexpr, dtype: tl.constexpr):
    """Add the products of a group of four columns: x (int64) and half `slot` of W's words."""
    x0 = entry(x, 0, dtype)
    x1 = entry(x, 1, dtype)
    x2 = entry(x, 2, dtype)
    x3 = entry(x, 3, dtype)
    first = entry(word, 2 * slot, dtype)
    second = entry(word, 2 * slot + 1, dtype)
    kept = bits >> (4 * slot)
    sums += first * tl.where(kept & 1 != 0, x0, tl.where(kept & 2 != 0, x1, x2))
    sums += second * tl.where(kept & 8 != 0, x3, tl.where(kept & 4 != 0, x2, x1))
    return sums


@triton.jit
def add_row(sums, words, mask, inside, x0, x1, x2, x3, dtype: tl.constexpr):
    """Add the products of one row: pairs of words at pointers [pairs, 2], and four groups of x."""
    word0, word1 = tl.split(tl.load(words, mask=inside, other=0))
    bits0, bits1 = tl.split(tl.load(mask, mask=inside, other=0))
    sums = add_group(sums, x0, word0, bits0, 0, dtype)
    sums = add_group(sums, x1, word0, bits0, 1, dtype)
    sums = add_group(sums, x2, word1, bits1, 0, dtype)
    return add_group(sums, x3, word1, bits1, 1, dtype)


@triton.autotune(configs=tunable(CONFIGS), key=["outputs", "groups"], do_bench=bench)
@triton.jit
def kernel(
    x,
    words,
    mask,
    bias,
    y,
    outputs,
    groups,
    pairs,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply one token with four rows of the weight, BLOCK_P pairs of words at a time.

    x is int64[tokens, groups], four columns in each; a row of the weight has 2 * `pairs` words.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    n = tl.program_id(0) * 4
    # 64 bits: a weight may have more than 2^31 entries.
    token = tl.program_id(1).to(tl.int64)
    x += token * groups
    row = 2 * pairs
    words += n.to(tl.int64) * row
    mask += n.to(tl.int64) * row
    two = tl.arange(0, 2)[None, :]
    sums0 = tl.zeros((BLOCK_P,), tl.float32)
    sums1 = tl.zeros((BLOCK_P,), tl.float32)
    sums2 = tl.zeros((BLOCK_P,), tl.float32)
    sums3 = tl.zeros((BLOCK_P,), tl.float32)
    # Nothing is read of rows beyond the last one.
    pairs1 = tl.where(n + 1 < outputs, pairs, 0)
    pairs2 = tl.where(n + 2 < outputs, pairs, 0)
    pairs3 = tl.where(n + 3 < outputs, pairs, 0)
    for start in tl.range(0, pairs, BLOCK_P, num_stages=STAGES):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        group = 4 * p + two
        x0, x1 = tl.split(tl.load(x + group, mask=group < groups, other=0))
        x2, x3 = tl.split(tl.load(x + group + 2, mask=group + 2 < groups, other=0))
        at = 2 * p + two
        w, b = words + at, mask + at
        sums0 = add_row(sums0, w, b, p < pairs, x0, x1, x2, x3, dtype)
        sums1 = add_row(sums1, w + row, b + row, p < pairs1, x0, x1, x2, x3, dtype)
        sums2 = add_row(sums2, w + 2 * row, b + 2 * row, p < pairs2, x0, x1, x2, x3, dtype)
        sums3 = add_row(sums3, w + 3 * row, b + 3 * row, p < pairs3, x0, x1, x2, x3, dtype)
    # [pair, high bit of the row, low bit] -> [row]
    sums = tl.join(tl.join(sums0, sums2), tl.join(sums1, sums3))
    total = tl.reshape(tl.sum(sums, axis=0), (4,))
    rows = n + tl.arange(0, 4)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < outputs, other=0.0).to(tl.float32)
    tl.store(y + token * outputs + rows, total.to(dtype), mask=rows < outputs)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, summed in float32.

    Args:
        x: [tokens, inputs] in the weight's dtype; if there are more tokens than `MOST_TOKENS`, W is
            read again for each.
        weight: [outputs, inputs].
        bias: [outputs].

    Returns:
        [tokens, outputs] in the weight's dtype.
    """
    y = weight.product(x, bias)
    tokens = len(x)
    groups = aligned(x).view(torch.int64)
    kernel[(triton.cdiv(weight.rows, ROWS), tokens)](
        groups,
        weight.words,
        weight.mask,
        y if bias is None else bias,
        y,
        weight.rows,
        groups.shape[1],
        weight.words.shape[1] // 2,
        HAS_BIAS=bias is not None,
        enable_fp_fusion=True,  # Triton is about to change the default
    )
    return y
