"""Wanda: the weights whose product with the size of their input is smallest go. Updates nothing.

Source: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language
Models", arXiv 2306.11695. Score |W_ij| ||X_j||_2; its square is twice the optimal-brain-damage
saliency. Cost: one sort a row.
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

    Unstructured: the same number in every row. n:m: the smallest of each group. Structured (as the
    Thanos paper defines this baseline): the columns with the smallest mean score.

    Raises:
        ModelError: see `check`.
        HessianError: weight or Hessian are not finite.
    """
    from thanos_deploy.solver.hessian import require_finite
    from thanos_deploy.solver.layer import without_update
    from thanos_deploy.solver.mask import smallest

    check(problem.name, problem.weight.shape[1], pattern, options)
    require_finite(problem)
    scores = problem.weight.abs() * problem.hessian.diagonal().clamp(min=0).sqrt()
    mask = smallest(scores, pattern, per_row=True)
    return without_update(problem, mask)


def divisible(pattern: Pattern, options: Options) -> bool:
    """What becomes of a row does not depend on the other rows of its layer."""
    return not isinstance(pattern, Structured)


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse what `prune` could not do for a layer, from its width alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
    """
    check_group(name, cols, pattern)
