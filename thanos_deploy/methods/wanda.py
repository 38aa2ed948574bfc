"""Wanda: remove the weights with the smallest magnitude times input norm, and update no others.

Source: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language
Models", arXiv 2306.11695. Score |W_ij| ||X_j||_2; its square is twice the optimal-brain-damage
saliency. Cost: one sort per row.
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
    """Wanda has no options."""


PRESETS = {"paper": Preset(Options())}


def prune(problem: LayerProblem, pattern: Pattern, options: Options) -> LayerResult:
    """Prune one linear layer.

    Removes, for unstructured patterns, the same number of weights in every row; for n:m patterns,
    the smallest scores of each group; for structured patterns (as the Thanos paper defines this
    baseline), the columns with the smallest mean score.

    Raises:
        ModelError: see `check`.
        HessianError: the weight or the Hessian is not finite.
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
    """Return whether ranks can prune the rows of a layer separately; false for whole columns.

    The mask of a row does not depend on the other rows.
    """
    return not isinstance(pattern, Structured)


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse a layer that `prune` cannot handle, judged by its number of inputs alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
    """
    check_group(name, cols, pattern)
