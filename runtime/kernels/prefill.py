"""y = x W^T + b for many tokens, with W 2:4: a Triton kernel that unpacks W in registers.

For shapes and dtypes that no sparse tensor-core kernel takes. Triton has no `mma.sp`, so this saves
the bandwidth and the memory of the weights (9/16 of them is read) and not one multiplication: the
zeros are put back into a tile in registers, and dense tensor cores multiply it.

Column c of a group holds, by the bits of its mask:

    0   bit 0 ? first : 0                        2   bit 2 ? (bit 3 ? first : second) : 0
    1   bit 1 ? (bit 0 ? second : first) : 0     3   bit 3 ? second : 0
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.decode import group, tunable
from runtime.kernels.packed import PackedWeight

MOST_TOKENS_AT_ONCE = 128


@triton.jit
def columns(words, bits, slot: tl.constexpr):
    """The four columns of the first or second group of 8, uint16."""
    first, second, kept = group(words, bits, slot)
    zero = tl.zeros_like(first)
    return (
        tl.where(kept & 1 != 0, first, zero),
        tl.where(kept & 2 != 0, tl.where(kept & 1 != 0, second, first), zero),
        tl.where(kept & 4 != 0, tl.where(kept & 8 != 0, first, second), zero),
        tl.where(kept & 8 != 0, second, zero),
    )


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_N": rows, "BLOCK_U": units}, num_warps=warps, num_stages=stages)
        for rows, units, warps, stages in [
            (32, 8, 4, 4),
            (64, 8, 4, 4),
            (128, 8, 8, 3),
            (128, 4, 4, 4),
        ]
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
    # Programs that follow each other share rows of the weight, and all of x stays in the L2 cache.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: tokens * inputs may pass 2^31.
    row_m = m.to(tl.int64)[:, None] * inputs
    row_n = n.to(tl.int64)[:, None] * words_per_row
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, words_per_row, BLOCK_U):
        # Words of a row are a multiple of BLOCK_U.
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
    tl.store(
        y + m.to(tl.int64)[:, None] * outputs + n[None, :],
        sums.to(y.dtype.element_ty),
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
    block_m = min(max(16, triton.next_power_of_2(tokens)), MOST_TOKENS_AT_ONCE)
    kernel[
        lambda tiles: (triton.cdiv(tokens, block_m), triton.cdiv(weight.rows, tiles["BLOCK_N"]))
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
