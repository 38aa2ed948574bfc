"""A 2:4 weight on a device, as the kernels read it: as `thanos_deploy.model.packing`, padded.

Of 8 columns the 4 kept values are one int64 and the 4 + 4 mask bits one byte, so a kernel finds
both at the same index. The 2-bit indices of `mma.sp` would take the same space; kernels without it
are better off with the mask, because they select by single bits and never need an index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.errors import InputError
from thanos_deploy.model.packing import pack
from thanos_deploy.pattern import SemiStructured

_COLUMNS_PER_WORD = 8

# Columns are padded to this multiple: every row then begins at a multiple of 128 bytes of values
# and of 16 bytes of mask, which is what Triton needs to know before it loads 16 bytes at once.
_COLUMNS_MULTIPLE = 128

DTYPES = (torch.float16, torch.bfloat16)


def require_dtype(weight: Tensor, name: str) -> None:
    """Refuse a weight that no 2:4 kernel takes.

    Raises:
        InputError: it is not one of `DTYPES`.
    """
    if weight.dtype not in DTYPES:
        raise InputError(
            f"{name}: the 2:4 kernels do not support {weight.dtype}",
            fix=f"use one of {', '.join(map(str, DTYPES))}",
        )


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and from a multiple of 16 bytes on, as loads of 16 bytes need it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A 2:4 matrix.

    Attributes:
        words: int64[rows, padded columns / 8], the kept values of 8 columns each.
        mask: uint8[rows, padded columns / 8], bit c of a byte is set where column c is kept.
        columns: of the matrix itself.
        dtype: of the values, one of `DTYPES`.
    """

    words: Tensor
    mask: Tensor
    columns: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.words.shape[0]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Memory for x W^T + bias: the weight's dtype [tokens, rows].

        Args:
            x: the weight's dtype [tokens, columns].
            bias: [rows], contiguous.
        """
        tokens, inputs = x.shape
        assert (inputs, x.dtype) == (self.columns, self.dtype)
        assert bias is None or bias.is_contiguous()
        return x.new_empty(tokens, self.rows)

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "PackedWeight":
        """Pack a matrix, on the device where it is.

        Args:
            weight: one of `DTYPES` [rows, columns], 2:4 along the columns.
            name: for the message.

        Raises:
            InputError: another dtype.
            ModelError: the weight is not 2:4.
        """
        require_dtype(weight, name)
        columns = weight.shape[1]
        values, mask = pack(weight.detach(), SemiStructured(2, 4), name)
        padded = -(-columns // _COLUMNS_MULTIPLE) * _COLUMNS_MULTIPLE
        values = torch.nn.functional.pad(values, (0, (padded - columns) // 2))
        mask = torch.nn.functional.pad(mask, (0, padded // _COLUMNS_PER_WORD - mask.shape[1]))
        return cls(values.view(torch.int64), mask, columns, weight.dtype)
