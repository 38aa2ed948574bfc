"""y = x W^T + b with W 2:4, by cuSPARSELt, through torch's operators and not its tensor subclass.

The subclass always takes algorithm 0, splits nothing, and returns a transposed view, which later
attention kernels copy or refuse. Here the library searches, by running, for the fastest algorithm
and division of the columns, once for each shape and power of two that the tokens are padded to.

In bf16 the library writes the result as [tokens, outputs]. In fp16 it compiles every product anew
for that, 0.25 s each on an H100, and its search ends the process with an illegal instruction
(torch 2.11, cuSPARSELt 0.8, every size that was tried); there the result is transposed afterwards.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# As torch pads them: `SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS`.
_TOKENS_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How cuSPARSELt multiplies; the defaults are what torch takes without a search.

    Attributes:
        number: of the algorithm, up to the library's largest.
        split_k: into how many parts the columns are divided.
        split_k_mode: whether one kernel adds the parts or two; -1 leaves it to the library.
    """

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True, slots=True)
class _Product:
    """What an algorithm is searched for."""

    outputs: int
    inputs: int
    tokens: int
    dtype: torch.dtype
    has_bias: bool
    device: torch.device


_found: dict[_Product, Algorithm] = {}


@dataclass(frozen=True, slots=True, eq=False)
class CusparseltWeight:
    """A 2:4 matrix as the library stores it.

    Attributes:
        compressed: kept values and metadata.
        rows, columns: of the matrix.
    """

    compressed: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor) -> "CusparseltWeight":
        """Compress a matrix.

        Args:
            weight: [rows, columns], on a GPU, that `packing.require_semi_structured` lets through:
                the library checks no pattern, and loses what does not fit.
        """
        return cls(torch._cslt_compress(weight.detach().contiguous()), *weight.shape)


def linear(
    x: Tensor, weight: CusparseltWeight, bias: Tensor | None = None, *, search: bool = True
) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: the weight's dtype [tokens, inputs], on a GPU.
        weight: [outputs, inputs].
        bias: the weight's dtype [outputs].
        search: for the fastest algorithm, if that was not done yet; or take torch's default.

    Returns:
        the weight's dtype [tokens, outputs], contiguous.
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
    """The library writes [tokens, outputs], and not [outputs, tokens], without harm."""
    return dtype != torch.float16


def _searched(dense: Tensor, weight: CusparseltWeight, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for dense [inputs, padded tokens]."""
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
