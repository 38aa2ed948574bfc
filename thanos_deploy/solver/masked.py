"""Least squares with some of the unknowns fixed, for all rows of a layer at once."""

import torch
from torch import Tensor

from thanos_deploy.machine.precision import products_in

# Relative residual, in the preconditioned norm, at which a row counts as solved. The loss is
# quadratic in it: the float32 value costs about 1e-8 of the loss, less than rounding does.
_SOLVED = {torch.float32: 1e-4, torch.float64: 1e-12}

# The same where all weights are fitted once more afterwards.
_REFITTED = {torch.float32: 0.1, torch.float64: 1e-12}

# Weights that are solved together, in whole rows: each step needs a few numbers beside each. As
# many as fit into the caches of a processor; a GPU needs more, to be busy.
_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}

# Steps after which the host asks whether all rows are solved. A processor knows at once; a GPU has
# to be waited for, which takes as long as some steps of one block. Rows that are solved stay as
# they are, so this changes no result.
_ASKING = {"cpu": 1, "cuda": 4}


def entries_together(device: torch.device) -> int:
    """The most weights that are solved together on a device."""
    return _ENTRIES[device.type]


def tolerance_of(dtype: torch.dtype, *, refitted: bool) -> float:
    """The residual at which a row counts as solved; see `solve_masked`.

    Args:
        dtype: of the weights, float32 or float64.
        refitted: all kept weights are fitted once more afterwards.
    """
    return (_REFITTED if refitted else _SOLVED)[dtype]


def solve_masked(
    w: Tensor,
    mask: Tensor,
    S: Tensor,
    *,
    diagonal: Tensor | None = None,
    start: Tensor | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    products: torch.dtype = torch.float32,
) -> Tensor:
    """For every row, the d with d = -w on the mask that minimises d S d^T.

    Conjugate gradients with the diagonal of S as preconditioner, all rows at once. The objective
    falls with every step, so stopping early never leaves a row worse than it was at the start. A
    row that is solved stays as it is, whatever the others need.

    Args:
        w: [rows, B], the weights.
        mask: bool[rows, B], True = removed.
        S: [B, B], symmetric positive definite.
        diagonal: [B], that of S where S itself has another one.
        start: [rows, B], where to start on the kept entries; zero if None.
        steps: the most steps; if None, 2 B (exact arithmetic needs at most B).
        tolerance: relative residual, in the preconditioned norm, at which a row is done; if None,
            that of the dtype.
        products: bfloat16 lets the steps round what they multiply where that is faster. It is the
            change from `start` that is rounded, which another step makes up for in less time.

    Returns:
        [rows, B], exactly -w on the mask.
    """
    # In units in which the diagonal of S is 1, there is nothing left to precondition.
    unit = (S.diagonal() if diagonal is None else diagonal).rsqrt()
    S = (S * unit).mul_(unit[:, None])
    S.diagonal().fill_(1.0)
    tolerance = _SOLVED[w.dtype] if tolerance is None else tolerance
    steps = 2 * w.shape[1] if steps is None else steps
    result = torch.empty_like(w)
    together = max(1, entries_together(w.device) // w.shape[1])
    for rows in (slice(at, at + together) for at in range(0, len(w), together)):
        keep = (~mask[rows]).to(w.dtype)
        fixed = w[rows] * (keep - 1.0)
        d = (fixed if start is None else fixed + start[rows] * keep).div(unit)
        _conjugate_gradients(d, keep, S, steps, tolerance, products)
        torch.mul(d, unit, out=result[rows]).mul_(keep).add_(fixed)
    return result


def _conjugate_gradients(
    d: Tensor, keep: Tensor, S: Tensor, steps: int, tolerance: float, products: torch.dtype
) -> None:
    """Minimise d S d^T on the kept entries, in place, from the values that they have.

    Args:
        d: [rows, cols].
        keep: [rows, cols], 1 for what may change and 0 for what may not.
        S: [cols, cols], with ones on its diagonal.
        steps: the most steps.
        tolerance, products: see `solve_masked`.
    """
    residual = torch.mm(d, S).mul_(keep).neg_()
    direction, image, product = residual.clone(), torch.empty_like(d), torch.empty_like(d)
    rr = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
    solved = rr * tolerance**2
    every = _ASKING[d.device.type]
    with products_in(products):
        for number in range(1, steps + 1):
            if number % every == 0 and bool((rr <= solved).all()):
                break
            torch.mm(direction, S, out=image).mul_(keep)
            curvature = torch.mul(direction, image, out=product).sum(dim=1, keepdim=True)
            step = torch.where(rr > solved, rr / curvature, 0.0)
            d.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1.0)
            rr_next = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
            direction.mul_(torch.where(rr > solved, rr_next / rr, 0.0)).add_(residual)
            rr = rr_next
