"""Recipes of tests: a method as its own paper has it, with blocks that run in float32."""

from typing import Any

from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.recipe import Recipe


def plain(pattern: Pattern, method: str = "magnitude", **given: Any) -> Recipe:
    """The paper's preset, but for what is given by the keywords of options."""
    return Recipe.of(pattern, method=method, preset="paper", **{"calib_forward": "fp32", **given})
