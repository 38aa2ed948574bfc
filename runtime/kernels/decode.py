"""y = x W^T + b for few tokens, with W 2:4: a Triton kernel that reads 9/16 of the bytes of W.

Decoding waits for the weights to come from memory, and 2:4 in 16 bits is 9/16 of them. Sparse
tensor cores would not help: they save multiplications, and nothing waits for those. Each kept value
picks its partner out of four inputs by two selects on the bits of the mask,

    first of the group    x[bit 0 ? 0 : bit 1 ? 1 : 2]
    second of the group   x[bit 3 ? 3 : bit 2 ? 2 : 1]

which takes no gather and no table. The work grows with the tokens, so beyond `MOST_TOKENS` the
kernel in `prefill` is the one to use.
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.packed import PackedWeight

# The loop compiled for sm_90, with 16 rows at once, has 24 instructions for a group of four columns
# and one token, 32 for two and 46 for four. An H100 (3.35 TB/s, 132 processors issuing 128 lanes
# at 1.755 GHz) has time for 40 while it reads the group's 4.5 bytes.
MOST_TOKENS = 4


def tunable(configs: list[triton.Config], *_: object, **__: object) -> list[triton.Config]:
    """The configurations to choose from; the interpreter measures nothing."""
    return configs[:1] if triton.knobs.runtime.interpret else configs


@triton.jit
def group(words, bits, slot: tl.constexpr):
    """The first or second group of 8 columns: bits of its two values, uint16, and its mask."""
    pair = words >> (32 * slot)
    return (
        (pair & 0xFFFF).to(tl.uint16),
        ((pair >> 16) & 0xFFFF).to(tl.uint16),
        (bits >> (4 * slot)) & 0xF,
    )


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_N": rows, "BLOCK_U": units}, num_warps=warps)
        for rows, units, warps in [(4, 64, 4), (16, 64, 4), (8, 128, 8)]
    ],
    key=["outputs", "inputs", "BLOCK_M"],
    prune_configs_by={"early_config_prune": tunable},
)
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
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """BLOCK_M tokens times BLOCK_N rows of the weight, BLOCK_U words of a row at a time."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # 64 bits: tokens * inputs may pass 2^31.
    row_n = n.to(tl.int64)[:, None] * words_per_row
    row_m = m.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_U), tl.float32)
    for start in range(0, words_per_row, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        inside = (n < outputs)[:, None] & (u < words_per_row)[None, :]
        word = tl.load(words + row_n + u[None, :], mask=inside, other=0)
        bits = tl.load(mask + row_n + u[None, :], mask=inside, other=0)
        for slot in tl.static_range(2):
            first, second, kept = group(word, bits, slot)
            first = first.to(x.dtype.element_ty, bitcast=True).to(tl.float32)[None]
            second = second.to(x.dtype.element_ty, bitcast=True).to(tl.float32)[None]
            kept = kept[None]
            column = u * 8 + 4 * slot
            # Inputs are a multiple of 4, so a group is inside as a whole or not at all.
            read = (m < tokens)[:, None] & (column < inputs)[None, :]
            at = x + row_m + column[None, :]
            x0 = tl.load(at, mask=read, other=0.0).to(tl.float32)[:, None, :]
            x1 = tl.load(at + 1, mask=read, other=0.0).to(tl.float32)[:, None, :]
            x2 = tl.load(at + 2, mask=read, other=0.0).to(tl.float32)[:, None, :]
            x3 = tl.load(at + 3, mask=read, other=0.0).to(tl.float32)[:, None, :]
            sums += first * tl.where(kept & 1 != 0, x0, tl.where(kept & 2 != 0, x1, x2))
            sums += second * tl.where(kept & 8 != 0, x3, tl.where(kept & 4 != 0, x2, x1))
    total = tl.sum(sums, axis=2)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m.to(tl.int64)[:, None] * outputs + n[None, :],
        total.to(y.dtype.element_ty),
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
    block_m = min(triton.next_power_of_2(tokens), MOST_TOKENS)
    kernel[
        lambda tiles: (triton.cdiv(weight.rows, tiles["BLOCK_N"]), triton.cdiv(tokens, block_m))
    ](
        x.contiguous(),
        weight.words,
        weight.mask,
        y if bias is None else bias,
        y,
        tokens,
        weight.rows,
        inputs,
        weight.words.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        enable_fp_fusion=True,  # Triton is about to change the default
    )
    return y
