"""Recipes for tests: a method as in its paper, with calibration passes in float32."""

from typing import Any

from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.recipe import Recipe


def plain(pattern: Pattern, method: str = "magnitude", **given: Any) -> Recipe:
    """Return the recipe of a method's preset `paper`.

    Args:
        pattern: the sparsity pattern.
        method: name of the method.
        given: options that differ from the preset, by their keywords.
    """
    return Recipe.of(pattern, method=method, preset="paper", **{"calib_forward": "fp32", **given})
