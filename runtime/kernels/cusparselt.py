"""y = x W^T + b with W 2:4, by cuSPARSELt, through torch's operators and not its tensor subclass.

The subclass always takes algorithm 0, splits nothing, and returns a transposed view, which later
attention kernels copy or refuse. Here the library searches, by running, for the fastest algorithm
and division of the columns, once for each shape and padded number of tokens; and it writes the
result as [tokens, outputs].
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
    y = torch._cslt_sparse_mm(
        weight.compressed,
        dense,
        bias=bias,
        transpose_result=True,
        alg_id=algorithm.number,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return y[:tokens]


def _searched(dense: Tensor, weight: CusparseltWeight, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for dense [inputs, padded tokens]."""
    product = _Product(
        weight.rows, weight.columns, dense.shape[1], dense.dtype, bias is not None, dense.device
    )
    if product not in _found:
        library: Any = torch._C._cusparselt  # of CUDA builds; torch types none of it
        number, split_k, split_k_mode, _ = library.mm_search(
            weight.compressed, dense, bias, None, None, True
        )
        _found[product] = Algorithm(number, split_k, split_k_mode)
    return _found[product]
