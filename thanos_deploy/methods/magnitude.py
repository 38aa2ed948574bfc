"""Magnitude pruning: the smallest weights go, whatever their inputs are. Updates nothing.

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
    """It has none."""


PRESETS = {"paper": Preset(Options())}


def prune(problem: LayerProblem, pattern: Pattern, options: Options) -> LayerResult:
    """Prune one linear layer.

    Unstructured: the smallest of the whole matrix. n:m: the smallest of each group. Structured:
    the columns with the smallest mean magnitude.

    Raises:
        ModelError: see `check`.
        HessianError: weight or Hessian are not finite.
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
    """Rows can be pruned apart: a threshold is found by counting, and groups are within rows."""
    return not isinstance(pattern, Structured)


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse what `prune` could not do for a layer, from its width alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
    """
    check_group(name, cols, pattern)
