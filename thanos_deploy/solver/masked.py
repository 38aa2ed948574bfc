"""Least squares with some of the unknowns fixed, for all rows of a layer at once."""

import torch
from torch import Tensor

from thanos_deploy.machine.precision import products_in
from thanos_deploy.solver.division import Division

# Relative residual, in the preconditioned norm, at which a row counts as solved. The loss is
# quadratic in it: the float32 value costs about 1e-8 of the loss, less than rounding does.
_SOLVED = {torch.float32: 1e-4, torch.float64: 1e-12}

# The same if a refit of all kept weights follows.
_REFITTED = {torch.float32: 0.1, torch.float64: 1e-12}

# Weights that are solved together, in whole rows; each step needs a few temporaries per weight. On
# a CPU they should fit into the caches. A GPU needs more to be busy.
_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}

# Step limits on a GPU, which takes all steps, because a test for convergence would wait for the
# device. The first limit holds if a refit of all kept weights follows (the blocks of SmolLM2-135M
# mostly took 2 or 3 steps, and 9 at most), the second for the first attempt otherwise. Solved rows
# no longer change, so surplus steps change no result. A CPU tests before each step.
_REFITTED_STEPS, _FIRST_STEPS = 8, 32


def entries_together(device: torch.device) -> int:
    """The largest number of weights that are solved together on a device."""
    return _ENTRIES[device.type]


def tolerance_of(dtype: torch.dtype, *, refitted: bool) -> float:
    """The relative residual at which a row counts as solved; see `solve_masked`.

    Args:
        dtype: dtype of the weights, float32 or float64.
        refitted: a refit of all kept weights follows.
    """
    return (_REFITTED if refitted else _SOLVED)[dtype]


def attempts(device: torch.device, columns: int, *, refitted: bool) -> list[int]:
    """Limits on the steps of every block: for the first attempt, and for each one that follows.

    A further attempt is made only if the one before left rows unsolved.

    Args:
        device: device of the weights.
        columns: number of columns of a block.
        refitted: a refit of all kept weights follows, for which nearly solved rows are as good.
    """
    enough = 2 * columns
    if device.type == "cpu":
        return [enough]
    if refitted:
        return [min(_REFITTED_STEPS, enough)]
    steps = [_FIRST_STEPS]
    while steps[-1] < enough:
        steps.append(4 * steps[-1])
    return [min(one, enough) for one in steps]


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
    unsolved: Tensor | None = None,
    division: Division | None = None,
) -> Tensor:
    """Minimise d S d^T for every row, with d = -w on the mask.

    Runs conjugate gradients on all rows at once, with the diagonal of S as preconditioner. The
    objective falls with every step, so stopping early never leaves a row worse than at the start. A
    solved row no longer changes, however many steps other rows need.

    Args:
        w: [rows, B], the weights.
        mask: bool[rows, B], True = removed.
        S: [B, B], symmetric positive definite.
        diagonal: [B], replaces the diagonal of S; None to use S as it is.
        start: [rows, B], initial values of the kept entries of d; zero if None.
        steps: largest number of steps; if None, 2 B (exact arithmetic needs at most B).
        tolerance: relative residual, in the preconditioned norm, at which a row is solved; if None,
            the default of the dtype.
        products: bfloat16 lets the steps round the operands of their products where that is faster.
            Only the change from `start` is rounded, and one more step makes up for that in less
            time.
        unsolved: int64 scalar on the device, to which the number of rows is added that were not
            solved within the steps.
        division: how the rows are divided; None for a single run.

    Returns:
        d, [rows, B]; exactly -w on the mask.
    """
    # Scale S to a unit diagonal, which takes the place of the preconditioner.
    unit = (S.diagonal() if diagonal is None else diagonal).rsqrt()
    S = (S * unit).mul_(unit[:, None])
    S.diagonal().fill_(1.0)
    tolerance = _SOLVED[w.dtype] if tolerance is None else tolerance
    steps = 2 * w.shape[1] if steps is None else steps
    result = torch.empty_like(w)
    together = max(1, entries_together(w.device) // w.shape[1])
    division = Division.whole(len(w)) if division is None else division
    for rows in division.pieces(together):
        keep = (~mask[rows]).to(w.dtype)
        fixed = w[rows] * (keep - 1.0)
        d = (fixed if start is None else fixed + start[rows] * keep).div(unit)
        missed = _conjugate_gradients(d, keep, S, steps, tolerance, products)
        if unsolved is not None:
            unsolved += missed.sum()
        torch.mul(d, unit, out=result[rows]).mul_(keep).add_(fixed)
    return result


def _conjugate_gradients(
    d: Tensor, keep: Tensor, S: Tensor, steps: int, tolerance: float, products: torch.dtype
) -> Tensor:
    """Minimise d S d^T over the kept entries, in place, from their current values.

    Args:
        d: [rows, cols].
        keep: [rows, cols], 1 for entries that may change and 0 for the others.
        S: [cols, cols], with a unit diagonal.
        steps: largest number of steps.
        tolerance, products: see `solve_masked`.

    Returns:
        bool[rows, 1], True for rows that are not solved.
    """
    residual = torch.mm(d, S).mul_(keep).neg_()
    direction, image, product = residual.clone(), torch.empty_like(d), torch.empty_like(d)
    rr = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
    solved = rr * tolerance**2
    asks = d.device.type == "cpu"
    with products_in(products):
        for _ in range(steps):
            if asks and bool((rr <= solved).all()):
                break
            torch.mm(direction, S, out=image).mul_(keep)
            curvature = torch.mul(direction, image, out=product).sum(dim=1, keepdim=True)
            step = torch.where(rr > solved, rr / curvature, 0.0)
            d.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1.0)
            rr_next = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
            direction.mul_(torch.where(rr > solved, rr_next / rr, 0.0)).add_(residual)
            rr = rr_next
    return rr > solved
