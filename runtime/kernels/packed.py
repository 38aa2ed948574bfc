"""A 2:4 weight in the layout of the Triton kernels: that of `thanos_deploy.model.packing`, padded.

The 4 kept values of 8 columns are one int64, and their 4 + 4 mask bits are one byte, so a kernel
finds both at the same index. The 2-bit indices of `mma.sp` would take the same space. Kernels
without `mma.sp` work better with the mask, because they select by single bits and never need an
index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.errors import InputError
from thanos_deploy.model.packing import pack
from thanos_deploy.pattern import SemiStructured

_COLUMNS_PER_WORD = 8

# Columns are padded to this multiple: every row then begins at a multiple of 128 bytes of values
# and of 16 bytes of mask. Triton loads 16 bytes at once only if it knows such an alignment.
_COLUMNS_MULTIPLE = 128

DTYPES = (torch.float16, torch.bfloat16)


def require_dtype(weight: Tensor, name: str) -> None:
    """Refuse a weight whose dtype no 2:4 kernel takes.

    Raises:
        InputError: the dtype is not one of `DTYPES`.
    """
    if weight.dtype not in DTYPES:
        raise InputError(
            f"{name}: the 2:4 kernels do not support {weight.dtype}",
            fix=f"use one of {', '.join(map(str, DTYPES))}",
        )


def aligned(x: Tensor) -> Tensor:
    """Return x contiguous and aligned to 16 bytes, as loads of 16 bytes need it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A 2:4 matrix.

    Attributes:
        words: int64[rows, padded columns / 8], the kept values of 8 columns each.
        mask: uint8[rows, padded columns / 8], bit c of a byte is set where column c is kept.
        columns: number of columns of the matrix, without padding.
        dtype: dtype of the values, one of `DTYPES`.
    """

    words: Tensor
    mask: Tensor
    columns: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Number of rows of the matrix."""
        return self.words.shape[0]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Check the operands of x W^T + bias, and allocate the result.

        Args:
            x: [tokens, columns] in the weight's dtype.
            bias: [rows], contiguous.

        Returns:
            Uninitialised [tokens, rows] in the weight's dtype.
        """
        tokens, inputs = x.shape
        assert (inputs, x.dtype) == (self.columns, self.dtype)
        assert bias is None or bias.is_contiguous()
        return x.new_empty(tokens, self.rows)

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "PackedWeight":
        """Pack a matrix, on the device where it is.

        Args:
            weight: [rows, columns] with a dtype of `DTYPES`, 2:4 along the columns.
            name: name of the weight, for the message of an error.

        Raises:
            InputError: the dtype is not one of `DTYPES`.
            ModelError: the weight is not 2:4.
        """
        require_dtype(weight, name)
        columns = weight.shape[1]
        values, mask = pack(weight.detach(), SemiStructured(2, 4), name)
        padded = -(-columns // _COLUMNS_MULTIPLE) * _COLUMNS_MULTIPLE
        values = torch.nn.functional.pad(values, (0, (padded - columns) // 2))
        mask = torch.nn.functional.pad(mask, (0, padded // _COLUMNS_PER_WORD - mask.shape[1]))
        return cls(values.view(torch.int64), mask, columns, weight.dtype)
