"""Cholesky factors and their inverses, computed in the memory of the matrix itself.

The float64 Hessian of a wide layer is larger than everything else that pruning a block needs, so it
is never copied.
"""

from typing import Protocol

import torch
from torch import Tensor

# Up to this width a matrix is inverted in one call, because there is nothing to save.
_SMALL = 512

# A product with a triangular matrix is computed in parts, each of which skips zeros of the
# triangle: the smallest number of columns of a part, and the largest number of parts.
_PART, _PARTS = 384, 4

# Rows that are reversed or converted at once.
_ROWS = 64


def turn_(matrix: Tensor) -> Tensor:
    """Reverse the order of the rows and of the columns of a square matrix, in place."""
    size = len(matrix)
    half = (size + 1) // 2  # with an odd size, the middle row trades places with itself
    for start in range(0, half, _ROWS):
        stop = min(start + _ROWS, half)
        top, bottom = matrix[start:stop], matrix[size - stop : size - start]
        turned = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(turned)
    return matrix


def narrow_(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a contiguous square matrix to a dtype that is not wider, within its own memory."""
    size = len(matrix)
    narrow = matrix.view(dtype).flatten()[: size * size].view(size, size)
    if dtype != matrix.dtype:
        for start in range(0, size, _ROWS):  # no row is written before it has been read
            narrow[start : start + _ROWS] = matrix[start : start + _ROWS].to(dtype)
    return narrow


def cholesky_(matrix: Tensor) -> Tensor | None:
    """Turn a symmetric matrix into its lower Cholesky factor, in place.

    Args:
        matrix: [n, n], contiguous; overwritten by the factor.

    Returns:
        the factor, a view of `matrix`; None if the matrix is not positive definite.
    """
    # LAPACK is column-major, and the columns of a symmetric matrix are its rows.
    lower = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return None if int(info) else lower


class Helpers(Protocol):
    """The ranks that need the same inverse at the same time and share its computation."""

    @property
    def rank(self) -> int:
        """The number of this rank among them."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Broadcast a contiguous tensor from the rank `source` to all of them, in place."""
        ...


def invert_(lower: Tensor, helpers: Helpers | None = None) -> None:
    """Invert a lower triangular matrix in place.

    By halves: [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. The product is
    computed in independent parts of its columns, so that helpers can share them.

    Args:
        lower: [n, n], overwritten by its inverse.
        helpers: the ranks that invert the same matrix now; None to invert it alone. The result is
            the same either way.
    """
    half = len(lower) // 2
    if len(lower) <= _SMALL:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    A, B, C = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_(A)
    invert_(C)
    columns, rows = _parts(half), _parts(len(C))
    for number, part in enumerate(columns):
        if helpers is not None and number % helpers.size != helpers.rank:
            continue
        product = B[:, part.start :] @ A[part.start :, part]
        for run in rows:
            torch.neg(C[run, : run.stop] @ product[: run.stop], out=B[run, part])
    if helpers is not None and helpers.size > 1:
        for number, part in enumerate(columns):
            made = B[:, part].contiguous()
            helpers.broadcast(made, number % helpers.size)
            B[:, part] = made


def _parts(count: int) -> list[slice]:
    parts = max(1, min(_PARTS, count // _PART))
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]
