"""What a 2:4 product must give, in float64, and how far 16 bits may be from it."""

import numpy as np
import torch
from torch import Tensor


def two_four(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random 2:4 matrix; one group in nine keeps less than two."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * columns // 4, 4, generator=generator)
    order = torch.rand(weight.shape, generator=generator).argsort(dim=1)
    weight.scatter_(1, order[:, 2:], 0)
    weight[::9].scatter_(1, order[::9, :1], 0)
    return weight.reshape(rows, columns).to(dtype)


def inputs(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Random x [tokens, columns] and bias [rows]."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return x, torch.randn(rows, generator=generator).to(dtype) if bias else None


def require_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compare with float64.

    Products of 16-bit numbers are exact in float32. What is allowed is one unit in the last place
    of the result's dtype, and one of float32 for each term of the sum.
    """
    expected, magnitude = (
        fold(x).numpy() @ fold(weight).numpy().T + (0 if bias is None else fold(bias).numpy())
        for fold in (Tensor.double, lambda tensor: tensor.double().abs())
    )
    allowed = torch.finfo(y.dtype).eps * np.abs(expected)
    allowed += (x.shape[1] + 1) * torch.finfo(torch.float32).eps * magnitude
    error = np.abs(y.cpu().double().numpy() - expected)
    assert y.shape == expected.shape
    assert (error <= allowed).all(), (error - allowed).max()
