"""The damped Hessian of a layer, factored once.

H = U U^T with U upper triangular, V = U^-1. Then for every column i the trailing Hessian
H[i:, i:] is U[i:, i:] U[i:, i:]^T and its inverse V[i:, i:]^T V[i:, i:]: whatever a method needs of
a trailing inverse is a sub-block of V, and nothing is inverted twice. Of U only blocks on the
diagonal are wanted, which are the inverses of V's, so only V is kept.
"""

import math

import torch
from torch import Tensor

from thanos_deploy.errors import HessianError
from thanos_deploy.solver.damping import DEFAULT, Damping
from thanos_deploy.solver.layer import Factor, LayerProblem
from thanos_deploy.solver.triangular import cholesky_, invert_, narrow_, turn_

# Rows to look at together where a copy of all would take memory for nothing.
_ROWS = 64

# A Hessian that is not numerically positive definite is damped ten times harder, so often at most.
_RETRIES = 4


def factor(problem: LayerProblem, damping: Damping = DEFAULT) -> Factor:
    """Damp and factor a layer's Hessian, in float64; once for all layers that share `factors`.

    Inputs that calibration never saw have a zero row and column in H; damping gives them a
    diagonal of their own, so they stay uncoupled from the rest.

    Args:
        problem: the layer.
        damping: what is added to the diagonal.

    Raises:
        HessianError: weight or Hessian are not finite, or no damping makes H positive definite.
    """
    _require_finite(problem, "weight", problem.weight)
    kept = {} if problem.factors is None else problem.factors
    key = damping.damping, damping.damping_mode
    if key not in kept:
        _require_finite(problem, "Hessian", problem.hessian)
        kept[key] = _factor(problem, *key)
    return kept[key]


def _factor(problem: LayerProblem, damping: float, mode: str) -> Factor:
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
    # Where no input is alive there is nothing to scale the damping by.
    scale = torch.where(alive.any(), scale, 1.0)
    for attempt in range(_RETRIES + 1):
        used = damping * 10**attempt
        damped = diagonal + used * scale
        # Reversing rows and columns turns the usual lower factor into the upper one.
        reverse = turn_(H.to(torch.float64, copy=True))
        reverse.diagonal().copy_(damped.flip(0))
        lower = cholesky_(reverse)
        if lower is not None:
            invert_(lower)
            return Factor(damped.to(dtype), narrow_(turn_(lower.mT), dtype).mT, used)
    raise HessianError(
        f"{problem.name}: the Hessian of {len(H)} inputs is not positive definite, even with "
        f"damping {used:g}",
        fix="use more calibration samples (--nsamples) or more damping (--damp)",
    )


def require_finite(problem: LayerProblem) -> None:
    """Refuse a layer whose weight or Hessian has NaN or infinite entries.

    Raises:
        HessianError: it has; the message says where and how many.
    """
    _require_finite(problem, "weight", problem.weight)
    _require_finite(problem, "Hessian", problem.hessian)


def _require_finite(problem: LayerProblem, what: str, tensor: Tensor) -> None:
    # A part at a time: what torch needs beside it to look takes as much memory as it.
    parts = torch.split(tensor, _ROWS)
    bad = int(sum(torch.count_nonzero(~part.isfinite()) for part in parts))
    if bad:
        raise HessianError(
            f"{problem.name}: {bad} of {tensor.numel()} entries of the {what} are NaN or infinite",
            fix="check the checkpoint for NaN; if it is clean, use other calibration text",
        )


def retarget(
    problem: LayerProblem, cross: Tensor, fraction: float, damping: Damping = DEFAULT
) -> Tensor:
    """The weight whose output, on the pruned model's inputs, is nearest to the dense model's.

    A layer of a pruned model does not see what the dense model's layer sees. With x its input and y
    the dense model's, the wanted output is W ((1 - f) x + f y), and the least-squares weight for it
    is W + f W (G - H) (H + D)^-1 with G = sum y x^T. Pruning that weight under H is the same as
    pruning W towards the wanted output, because what no weight can reach is constant.

    Args:
        problem: the layer, with H = sum x x^T.
        cross: [cols, cols], G in the scale of H.
        fraction: f; 0 is the pruned model's own output, 1 the dense model's.
        damping: D, which holds the weight near W; see `factor`.

    Returns:
        [rows, cols].

    Raises:
        HessianError: see `factor`.
    """
    V = factor(problem, damping).V
    missing = problem.weight @ (cross - problem.hessian)
    return problem.weight + fraction * (missing @ V.T @ V)
