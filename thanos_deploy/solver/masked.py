"""Least squares with some of the unknowns fixed, for all rows of a layer at once."""

import torch
from torch import Tensor

from thanos_deploy.machine.precision import products_in
from thanos_deploy.solver.division import Division

# Relative residual, in the preconditioned norm, at which a row counts as solved. The loss is
# quadratic in it: the float32 value costs about 1e-8 of the loss, less than rounding does.
_SOLVED = {torch.float32: 1e-4, torch.float64: 1e-12}

# The same where all weights are fitted once more afterwards.
_REFITTED = {torch.float32: 0.1, torch.float64: 1e-12}

# Weights that are solved together, in whole rows: each step needs a few numbers beside each. As
# many as fit into the caches of a processor; a GPU needs more, to be busy.
_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}

# Steps that a GPU takes, which nobody waits for to ask whether all rows are solved: so many where
# all kept weights are fitted once more afterwards (the blocks of SmolLM2-135M took 2 or 3 mostly,
# and 9 at most), and else so many at first. Rows that are solved stay as they are, so steps that
# were not wanted change no result. A processor knows without waiting, so it asks before each step.
_REFITTED_STEPS, _FIRST_STEPS = 8, 32


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


def attempts(device: torch.device, columns: int, *, refitted: bool) -> list[int]:
    """The most steps of every block: at first, and if rows were left unsolved, in each new attempt.

    Args:
        device: of the weights.
        columns: of a block.
        refitted: all kept weights are fitted once more afterwards, for which a row that is nearly
            solved is as good.
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
        unsolved: int64, a scalar on the device, to which the rows are added that were not solved
            in so many steps.
        division: how the rows are divided; None for one run of them.

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
    """Minimise d S d^T on the kept entries, in place, from the values that they have.

    Args:
        d: [rows, cols].
        keep: [rows, cols], 1 for what may change and 0 for what may not.
        S: [cols, cols], with ones on its diagonal.
        steps: the most steps.
        tolerance, products: see `solve_masked`.

    Returns:
        bool[rows, 1], the rows that are not solved.
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
