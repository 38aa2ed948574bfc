"""Quantise a layer so that its output changes least: error compensation, then descent.

Compensation quantises column by column, and the columns that follow absorb the error of each.
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, with the factor V of `solver.hessian`: the error of column j,
divided by V_jj, times row j of V is subtracted from the columns from j on. Columns with large
inputs come first (the authors' later `act-order`). Groups still consist of neighbouring columns,
and their scales are chosen beforehand, so that every format can hold the result. A group's scale
minimises the sum of squared errors weighted by 1 / V_jj^2, the part of the loss that no later
column can compensate.

Descent then improves codes, scales and zero points in turn; see `solver.descent`. A pruned weight
is always quantised to zero, and what it would have to be instead is passed on to the columns that
follow. Cost for a [rows, cols] layer: rows cols^2 for the compensation, and twice as much for each
pass of the descent.

The layers before are quantised already, so a layer can do better than to keep its own output: with
the statistics of both models it takes back a part of their error (`hessian.retarget`). Source of
the idea: Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
arXiv 2504.02692, which corrects column by column; here the weight is refitted once, beforehand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.solver.codes import Quantised, by_column, fit, nearest, round_to
from thanos_deploy.solver.damping import DEFAULT, Damping
from thanos_deploy.solver.descent import descend
from thanos_deploy.solver.grid import Grid
from thanos_deploy.solver.hessian import factor, retarget
from thanos_deploy.solver.layer import LayerProblem, output_energy

# Columns whose updates to the columns that follow are applied in one product.
_BLOCK = 128

# Default number of passes of the descent; see benchmarks/LOG.md.
PASSES = 3


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLayer:
    """A quantised layer and its errors.

    Attributes:
        quantised: the quantised weight.
        relative_error: energy that the quantised weight misses of the target output, as a fraction
            of `energy`.
        rounding_error: the same if every weight had been rounded to the nearest grid value.
        compensated: fraction of the rows in which compensation and descent lose no more than
            rounding; the other rows are rounded.
        energy: output energy of the layer before quantisation.
    """

    quantised: Quantised
    relative_error: float
    rounding_error: float
    compensated: float
    energy: float


def quantise(
    problem: LayerProblem,
    grid: Grid,
    damping: Damping = DEFAULT,
    *,
    cross: Tensor | None = None,
    fraction: float = 0.0,
    passes: int = PASSES,
) -> QuantisedLayer:
    """Quantise a layer by compensation and descent, or by rounding in rows where that is better.

    Rows do not depend on each other, so the choice is made for each row.

    Args:
        problem: the layer, pruned or not; its zeros stay zero.
        grid: the grid to quantise to.
        damping: damping of the Hessian.
        cross, fraction: the target output, see `hessian.retarget`; None for the output of the
            layer's own weight.
        passes: number of passes of the descent.

    Raises:
        HessianError: the weight or the Hessian is not finite, or the Hessian cannot be factored.
    """
    weight, hessian = problem.weight, problem.hessian
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factors = {} if problem.factors is None else problem.factors
    ordered = LayerProblem(weight[:, order], hessian[order][:, order], problem.name, factors)
    factored = factor(ordered, damping)
    target, kept = weight, weight != 0
    if cross is not None:
        target = torch.empty_like(weight)
        target[:, order] = retarget(ordered, cross[order][:, order], fraction, damping)
    damped = hessian.clone()
    damped.diagonal()[order] = factored.diagonal
    first = compensate(target, kept, factored.V, order, grid)
    best = descend(target, kept, damped, first, passes=passes)
    rounded = round_to(weight, grid)
    lost = output_energy(target - rounded.weight, hessian)
    lost_best = output_energy(target - best.weight, hessian)
    worse = ~(lost_best <= lost)  # written so that NaN is worse
    chosen = Quantised(
        grid,
        *(
            torch.where(worse[:, None], ours, others).contiguous()
            for ours, others in (
                (rounded.codes, best.codes),
                (rounded.scale, best.scale),
                (rounded.zero, best.zero),
            )
        ),
    )
    whole = output_energy(weight, hessian).sum().item()
    return QuantisedLayer(
        chosen,
        relative_error=torch.where(worse, lost, lost_best).sum().item() / whole
        if whole > 0
        else 0.0,
        rounding_error=lost.sum().item() / whole if whole > 0 else 0.0,
        compensated=1.0 - worse.double().mean().item(),
        energy=whole,
    )


def compensate(weight: Tensor, kept: Tensor, V: Tensor, order: Tensor, grid: Grid) -> Quantised:
    """Quantise column by column; the columns that follow absorb the error of each.

    Args:
        weight: [rows, cols], finite.
        kept: bool[rows, cols], False where the quantised weight is zero.
        V: [cols, cols], see `solver.layer.Factor`; for the Hessian with its inputs in `order`.
        order: int64[cols], the columns in the order in which they are quantised.
        grid: the grid to quantise to.
    """
    cols = weight.shape[1]
    prices = torch.empty_like(weight[0])
    prices[order] = V.diagonal().square().reciprocal()
    scale, zero = fit(torch.where(kept, weight, 0.0), prices, grid)
    W, keep = weight[:, order], kept[:, order]
    scales, zeros = (by_column(each, grid, cols)[:, order] for each in (scale, zero))
    found = torch.empty_like(W)
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            code = nearest(W[:, j], scales[:, j], zeros[:, j], grid)
            code = torch.where(keep[:, j], code, zeros[:, j])
            error = (W[:, j] - (code - zeros[:, j]) * scales[:, j]) / V[j, j]
            W[:, j + 1 : stop] -= error[:, None] * V[j, j + 1 : stop]
            found[:, j], errors[:, j - start] = code, error
        W[:, stop:] -= errors @ V[start:stop, stop:]
    codes = torch.empty_like(weight, dtype=torch.int16)
    codes[:, order] = found.to(torch.int16)
    return Quantised(grid, codes, scale, zero)
