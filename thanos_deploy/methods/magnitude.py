"""Magnitude pruning: remove the smallest weights, whatever their inputs are, and update no others.

Cost: one sort. The baseline that every other method has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thanos_deploy import option
from thanos_deploy.methods import Preset, check_group
from thanos_deploy.pattern import Pattern, Structured

if TYPE_CHECKING:
    from thanos_deploy.solver.layer import LayerProblem, LayerResult


@dataclass(frozen=True, slots=True)
class Options(option.Options):
    """Magnitude pruning has no options."""


PRESETS = {"paper": Preset(Options())}


def prune(problem: LayerProblem, pattern: Pattern, options: Options) -> LayerResult:
    """Prune one linear layer.

    Removes, for unstructured patterns, the smallest weights of the whole matrix; for n:m patterns,
    the smallest of each group; for structured patterns, the columns with the smallest mean
    magnitude.

    Raises:
        ModelError: see `check`.
        HessianError: the weight or the Hessian is not finite.
    """
    from thanos_deploy.solver.hessian import require_finite
    from thanos_deploy.solver.layer import without_update
    from thanos_deploy.solver.mask import smallest

    check(problem.name, problem.weight.shape[1], pattern, options)
    require_finite(problem)
    division = problem.division
    mask = smallest(problem.weight.abs(), pattern, per_row=False, division=division)
    return without_update(problem, mask)


def divisible(pattern: Pattern, options: Options) -> bool:
    """Return whether ranks can prune the rows of a layer separately; false for whole columns.

    The threshold of an unstructured pattern is found from counts, and n:m groups lie within rows.
    """
    return not isinstance(pattern, Structured)


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse a layer that `prune` cannot handle, judged by its number of inputs alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
    """
    check_group(name, cols, pattern)
