"""Cholesky factors and their inverses in the memory of the matrix itself.

The Hessian of a wide layer in float64 is larger than everything else that pruning a block needs, so
none of it is copied.
"""

from typing import Protocol

import torch
from torch import Tensor

# Below this width there is nothing to save.
_SMALL = 512

# A product with a triangle is made in parts of at least so many columns, and so many parts at most,
# each of which leaves zeros of the triangle out.
_PART, _PARTS = 384, 4

# Rows that are turned round at once.
_ROWS = 64


def turn_(matrix: Tensor) -> Tensor:
    """Put the rows and the columns of a square matrix into the opposite order."""
    size = len(matrix)
    half = (size + 1) // 2  # of an odd number the row in the middle changes places with itself
    for start in range(0, half, _ROWS):
        stop = min(start + _ROWS, half)
        top, bottom = matrix[start:stop], matrix[size - stop : size - start]
        turned = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(turned)
    return matrix


def narrow_(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous square matrix in a dtype that is not wider, at the beginning of its memory."""
    size = len(matrix)
    narrow = matrix.view(dtype).flatten()[: size * size].view(size, size)
    if dtype != matrix.dtype:
        for start in range(0, size, _ROWS):  # no row is written before it has been read
            narrow[start : start + _ROWS] = matrix[start : start + _ROWS].to(dtype)
    return narrow


def cholesky_(matrix: Tensor) -> Tensor | None:
    """Turn a symmetric matrix into its lower Cholesky factor.

    Args:
        matrix: [n, n], contiguous; its memory is the factor's.

    Returns:
        the factor; None if the matrix is not positive definite.
    """
    # LAPACK works on columns, and the columns of a symmetric matrix are its rows.
    lower = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return None if int(info) else lower


class Helpers(Protocol):
    """Those who need the same inverse at the same time, and make some of it each."""

    @property
    def rank(self) -> int:
        """The number of this one."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def spread(self, tensor: Tensor, source: int) -> None:
        """Give all of them, in place, what a contiguous tensor of one of them holds."""
        ...


def invert_(lower: Tensor, helpers: Helpers | None = None) -> None:
    """Turn a lower triangular matrix, [n, n], into its inverse, which is one too.

    By halves: [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. The product is
    made some columns at a time, which need nothing of each other, so that helpers can share them.

    Args:
        lower: the matrix.
        helpers: who has the same matrix now; None for nobody. The result does not depend on them.
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
            helpers.spread(made, number % helpers.size)
            B[:, part] = made


def _parts(count: int) -> list[slice]:
    parts = max(1, min(_PARTS, count // _PART))
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]
