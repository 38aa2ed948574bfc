"""The damped Hessian of a layer, factored once.

H = U U^T with U upper triangular, and V = U^-1. For every column i, the trailing Hessian
H[i:, i:] is U[i:, i:] U[i:, i:]^T and its inverse is V[i:, i:]^T V[i:, i:]. So every trailing
inverse comes from a sub-block of V, and nothing is inverted twice. Methods need only diagonal
blocks of U, which are the inverses of the same blocks of V, so only V is kept.
"""

import math
from contextlib import suppress

import torch
from torch import Tensor

from thanos_deploy.errors import HessianError
from thanos_deploy.solver.damping import DEFAULT, Damping
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.layer import Factor, LayerProblem
from thanos_deploy.solver.triangular import Helpers, cholesky_, invert_, narrow_, turn_

# If a Hessian is not numerically positive definite, damping grows tenfold, this often at most.
_RETRIES = 4


def factor(
    problem: LayerProblem, damping: Damping = DEFAULT, helpers: Helpers | None = None
) -> Factor:
    """Damp and factor a layer's Hessian in float64, once for all layers that share `factors`.

    Inputs that calibration never saw have a zero row and column in H. Damping gives them a positive
    diagonal entry, so they stay uncoupled from the other inputs.

    Args:
        problem: the layer.
        damping: the damping added to the diagonal.
        helpers: the ranks that factor the same Hessian now; None to factor it alone.

    Raises:
        HessianError: the weight or the Hessian is not finite, or no damping makes H positive
            definite.
    """
    require_finite_weight(problem)
    return _factor_once(problem, damping, helpers)


def prepare(problem: LayerProblem, damping: Damping, helpers: Helpers) -> None:
    """Factor a Hessian together with the other ranks that need it, and cache it in `factors`.

    If it cannot be factored, nothing is cached, and a later call of `factor` raises the error.

    Args:
        problem: a layer that reads the input; only the dtype of its weight matters.
        damping: see `factor`.
        helpers: the ranks that call this for the same Hessian.
    """
    with suppress(HessianError):
        _factor_once(problem, damping, helpers)


def _factor_once(problem: LayerProblem, damping: Damping, helpers: Helpers | None) -> Factor:
    kept = {} if problem.factors is None else problem.factors
    key = damping.damping, damping.damping_mode
    if key not in kept:
        _require_finite(problem, "Hessian", problem.hessian, Division.whole(len(problem.hessian)))
        kept[key] = _factor(problem, *key, helpers)
    return kept[key]


def _factor(problem: LayerProblem, damping: float, mode: str, helpers: Helpers | None) -> Factor:
    H, dtype = problem.hessian, problem.weight.dtype
    diagonal = H.diagonal().double()
    alive = diagonal > 0
    if mode == "mean":
        scale = diagonal.mean().expand_as(diagonal)
    elif mode == "median":
        lower_middle = (alive.sum(dim=0, keepdim=True) - 1).clamp(min=0) // 2
        rising = diagonal.where(alive, math.inf).sort().values
        scale = rising[lower_middle].expand_as(diagonal)
    else:
        mean = diagonal.where(alive, 0.0).sum() / alive.sum()
        scale = torch.where(alive, diagonal, mean)
    # If no input is alive, there is nothing to scale the damping by.
    scale = torch.where(alive.any(), scale, 1.0)
    for attempt in range(_RETRIES + 1):
        used = damping * 10**attempt
        damped = diagonal + used * scale
        # Reversing rows and columns turns the usual lower factor into the upper one.
        reverse = turn_(H.to(torch.float64, copy=True))
        reverse.diagonal().copy_(damped.flip(0))
        lower = cholesky_(reverse)
        if lower is not None:
            invert_(lower, helpers)
            return Factor(damped.to(dtype), narrow_(turn_(lower.mT), dtype).mT, used)
    raise HessianError(
        f"{problem.name}: the Hessian of {len(H)} inputs is not positive definite, even with "
        f"damping {used:g}",
        fix="use more calibration samples (--nsamples) or more damping (--damp)",
    )


def require_finite(problem: LayerProblem) -> None:
    """Refuse a layer whose weight or Hessian has NaN or infinite entries.

    Raises:
        HessianError: there are such entries; the message says where and how many.
    """
    require_finite_weight(problem)
    _require_finite(problem, "Hessian", problem.hessian, Division.whole(len(problem.hessian)))


def require_finite_weight(problem: LayerProblem) -> None:
    """Refuse a layer whose weight has NaN or infinite entries, on any rank that holds rows of it.

    Raises:
        HessianError: there are such entries; the message says where and how many.
    """
    _require_finite(problem, "weight", problem.weight, problem.division)


def _require_finite(problem: LayerProblem, what: str, tensor: Tensor, division: Division) -> None:
    if bad := division.not_finite(tensor):
        raise HessianError(
            f"{problem.name}: {bad} of {division.rows * tensor.shape[1]} entries of the {what} are "
            "NaN or infinite",
            fix="check the checkpoint for NaN; if it is clean, use other calibration text",
        )


def retarget(
    problem: LayerProblem, cross: Tensor, fraction: float, damping: Damping = DEFAULT
) -> Tensor:
    """Fit a weight on the pruned model's inputs to an output nearer to the dense model's.

    Let x be the layer's input in the pruned model and y its input in the dense model. The target
    output is W ((1 - f) x + f y), and the least-squares weight for it is
    W + f W (G - H) (H + D)^-1 with G = sum y x^T. Pruning that weight under H is the same as
    pruning W towards the target output, because the part of the target that no weight can reach
    adds only a constant.

    Args:
        problem: the layer, with H = sum x x^T.
        cross: [cols, cols], G in the scale of H.
        fraction: f; 0 is the pruned model's own output, 1 the dense model's.
        damping: D, which holds the weight near W; see `factor`.

    Returns:
        the fitted weight, [rows, cols].

    Raises:
        HessianError: see `factor`.
    """
    V = factor(problem, damping).V
    product = problem.division.product
    missing = product(problem.weight, cross - problem.hessian)
    return problem.weight + fraction * product(product(missing, V.T), V)
