"""Pruning methods, one per file.

Each module here has `prune(problem, pattern, **options) -> LayerResult`: pure, deterministic,
and without any knowledge of models, files or the command line. A new file is a new method; the
command line finds it by its name.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from thanos_deploy.pattern import Pattern

if TYPE_CHECKING:  # listing the methods must not pay for importing torch
    from thanos_deploy.layer import LayerProblem, LayerResult


class Method(Protocol):
    """What every module of this package provides as `prune`."""

    def __call__(  # noqa: D102 - the class says it
        self, problem: "LayerProblem", pattern: Pattern, **options: float
    ) -> "LayerResult": ...


def names() -> list[str]:
    """Names of the methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Method:
    """The `prune` function of a method."""
    prune: Method = import_module(f"{__name__}.{name}").prune
    return prune
