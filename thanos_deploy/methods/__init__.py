"""Pruning methods, one per file.

Each module here has two functions, described by `Method`: pure, deterministic, and without any
knowledge of models, files or the command line. A new file is a new method; the command line finds
it by its name.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from thanos_deploy.pattern import Pattern

if TYPE_CHECKING:  # listing the methods must not pay for importing torch
    from thanos_deploy.layer import LayerProblem, LayerResult


class Method(Protocol):
    """What every module of this package provides."""

    def prune(self, problem: "LayerProblem", pattern: Pattern, **options: float) -> "LayerResult":
        """Prune one linear layer."""

    def check(self, name: str, cols: int, pattern: Pattern, **options: float) -> None:
        """Refuse what `prune` could not do for a layer of so many inputs."""


def names() -> list[str]:
    """Names of the methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Method:
    """A method by its name, imported now."""
    return cast(Method, import_module(f"{__name__}.{name}"))
