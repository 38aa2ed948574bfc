"""y = x W^T + b with W 2:4 by cuSPARSELt, through torch's operators and not its tensor subclass.

The subclass always uses algorithm 0 without split-K, and returns a transposed view, which attention
kernels copy or refuse. Here the library searches for the fastest algorithm and split-K by running
them, once for each shape and number of tokens, rounded up to a power of two.

In bf16 the library writes the result as [tokens, outputs]. In fp16, writing that layout makes it
compile every product anew, 0.25 s each on an H100, and its search ends the process with an illegal
instruction (torch 2.11, cuSPARSELt 0.8, every size that was tried). So in fp16 the library writes
[outputs, tokens], and the result is transposed afterwards.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens are padded to this multiple, as torch does it; see
# `SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS`.
_TOKENS_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Algorithm settings of cuSPARSELt; the defaults are those of torch without a search.

    Attributes:
        number: the library's number of the algorithm.
        split_k: number of parts that the columns are divided into.
        split_k_mode: whether one kernel or two add the parts; -1 leaves it to the library.
    """

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True, slots=True)
class _Product:
    """The sizes and dtype of a product; an algorithm is searched once for each."""

    outputs: int
    inputs: int
    tokens: int
    dtype: torch.dtype
    has_bias: bool
    device: torch.device


_found: dict[_Product, Algorithm] = {}


@dataclass(frozen=True, slots=True, eq=False)
class CusparseltWeight:
    """A 2:4 matrix in the library's layout.

    Attributes:
        compressed: kept values and metadata.
        rows, columns: size of the dense matrix.
    """

    compressed: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor) -> "CusparseltWeight":
        """Compress a matrix.

        Args:
            weight: [rows, columns] on a GPU. The caller has checked it with
                `packing.require_semi_structured`, since the library checks no pattern and drops
                entries beyond two in a group.
        """
        return cls(torch._cslt_compress(weight.detach().contiguous()), *weight.shape)


def linear(
    x: Tensor, weight: CusparseltWeight, bias: Tensor | None = None, *, search: bool = True
) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: [tokens, inputs] in the weight's dtype, on a GPU.
        weight: [outputs, inputs].
        bias: [outputs] in the weight's dtype.
        search: use the fastest algorithm, which the first call for a size searches; False for
            torch's default.

    Returns:
        [tokens, outputs] in the weight's dtype, contiguous.
    """
    tokens = len(x)
    assert x.shape[1] == weight.columns
    dense = torch.nn.functional.pad(x, (0, 0, 0, -tokens % _TOKENS_MULTIPLE)).contiguous().T
    algorithm = _searched(dense, weight, bias) if search else Algorithm()
    transposed = _writes_transposed(x.dtype)
    y = torch._cslt_sparse_mm(
        weight.compressed,
        dense,
        bias=bias,
        transpose_result=transposed,
        alg_id=algorithm.number,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return y[:tokens] if transposed else y.T[:tokens].contiguous()


def _writes_transposed(dtype: torch.dtype) -> bool:
    """Whether to let the library write [tokens, outputs]; see the module's docstring on fp16."""
    return dtype != torch.float16


def _searched(dense: Tensor, weight: CusparseltWeight, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for a dense operand [inputs, padded tokens]."""
    tokens = 1 << (dense.shape[1] - 1).bit_length()
    product = _Product(
        weight.rows, weight.columns, tokens, dense.dtype, bias is not None, dense.device
    )
    if product not in _found:
        library: Any = torch._C._cusparselt  # of CUDA builds; torch types none of it
        full = torch.nn.functional.pad(dense.T, (0, 0, 0, tokens - dense.shape[1])).contiguous().T
        number, split_k, split_k_mode, _ = library.mm_search(
            weight.compressed, full, bias, None, None, _writes_transposed(dense.dtype)
        )
        _found[product] = Algorithm(number, split_k, split_k_mode)
    return _found[product]
