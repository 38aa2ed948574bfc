"""Prune one layer as well as its statistics allow, on the device of its tensors.

Nothing here knows of checkpoints or of the walk through a model, so a single layer can be solved on
any machine with PyTorch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.errors import HessianError
from thanos_deploy.methods import Method
from thanos_deploy.option import Options
from thanos_deploy.pattern import Pattern
from thanos_deploy.solver.damping import damping_of
from thanos_deploy.solver.hessian import retarget
from thanos_deploy.solver.layer import LayerProblem, LayerResult, without_update
from thanos_deploy.solver.mask import smallest


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A pruned layer, and how it was solved.

    Attributes:
        result: the pruned layer.
        solver: name of the method, or "wanda mask" or "magnitude mask" if only a mask was possible.
        failures: why earlier attempts failed, one sentence each.
    """

    result: LayerResult
    solver: str
    failures: tuple[str, ...]


def aim(
    problem: LayerProblem,
    cross: Tensor | None,
    fraction: float,
    options: Options,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Find a weight whose output is nearer to the dense model's.

    Args:
        problem: the layer.
        cross: see `statistics.Statistics`; None if it was not collected.
        fraction: see `hessian.retarget`.
        options: options of the method; if they contain a damping of the Hessian, it is used here.

    Returns:
        the weight, or None if there is no `cross` or the attempt failed; and why it failed, empty
        if it did not.

    Raises:
        HessianError: a weight is not finite.
    """
    if cross is None:
        return None, ()
    try:
        wanted = retarget(problem, cross, fraction, damping_of(options))
    except HessianError as error:
        if problem.division.not_finite(problem.weight):
            raise
        return None, (error.message,)
    return wanted, ()


def solve(
    problem: LayerProblem,
    pattern: Pattern,
    method: Method,
    options: Options,
    *,
    aimed: Tensor | None = None,
    failures: tuple[str, ...] = (),
) -> Solution:
    """Prune one layer by the first of these ways that its statistics allow.

    1. The method, from the weight whose output is nearer to the dense model's, if there is one;
       Thanos and SparseGPT damp a Hessian that cannot be factored ten times harder, up to four
       times.
    2. The method, from the layer's own weight.
    3. No update, only a mask of the whole layer: by Wanda's score, or by magnitude where not even
       the diagonal of the Hessian is finite.

    Args:
        problem: the layer.
        pattern: the pattern to prune to.
        method: the pruning method.
        options: options of the method.
        aimed, failures: see `aim`.

    Raises:
        HessianError: a weight is not finite.
        ModelError, UsageError: the layer does not fit the pattern, or the options do not.
    """
    for weight in (problem.weight,) if aimed is None else (aimed, problem.weight):
        try:
            result = method.prune(replace(problem, weight=weight), pattern, options)
            return Solution(result, method.name, failures)
        except HessianError as error:
            if problem.division.not_finite(problem.weight):
                raise
            failures = (*failures, error.message)
    return mask_only(problem, pattern, failures)


def mask_only(problem: LayerProblem, pattern: Pattern, failures: tuple[str, ...]) -> Solution:
    """Prune without an update, as in step 3 of `solve`.

    The reported error uses the Hessian if it is finite, otherwise its diagonal alone, or ones if
    the diagonal is not finite either.
    """
    # In float64, in which no product of float32 numbers overflows.
    weight, hessian = problem.weight.double(), problem.hessian.double()
    squares = hessian.diagonal().clamp(min=0.0)
    by_wanda = bool(squares.isfinite().all())
    if not by_wanda:
        squares = torch.ones_like(squares)
    scores, division = weight.abs() * squares.sqrt(), problem.division
    mask = smallest(scores, pattern, per_row=False, division=division)
    known = hessian if bool(hessian.isfinite().all()) else squares.diag()
    result = without_update(
        LayerProblem(weight, known, problem.name, divided=problem.divided), mask
    )
    return Solution(result, "wanda mask" if by_wanda else "magnitude mask", failures)


def solve_by_preset(
    problem: LayerProblem, pattern: Pattern, *, method: str = "thanos", preset: str = "best"
) -> LayerResult:
    """Prune one layer with a preset of a method, on the device of its tensors.

    The preset's settings for the walk through a model do not apply to one layer. When the call
    returns, the device has finished, because the error of the result has been read from it.

    Args:
        problem: weight and Hessian, on one device.
        pattern: the pattern to prune to.
        method, preset: names of the method and of its preset; see `methods`.

    Raises:
        HessianError: the weight or the Hessian is not finite, or the Hessian cannot be factored.
        ModelError, UsageError: the layer does not fit the pattern.
    """
    chosen = methods.load(method)
    return chosen.prune(problem, pattern, chosen.preset(preset).options)
