"""Pruning methods, one per file.

Each module here has two functions, described by `Method`: pure, deterministic, and without any
knowledge of models, files or the command line. A new file is a new method; the command line finds
it by its name.
"""

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from thanos_deploy.errors import ModelError, UsageError
from thanos_deploy.pattern import Pattern, SemiStructured

if TYPE_CHECKING:  # listing the methods must not pay for importing torch
    from thanos_deploy.solver.layer import LayerProblem, LayerResult


PRESET_NAMES = ("best", "fast", "paper")

# The value of what a method can be told beside the pattern.
Option = float | str


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to use a method on a whole model.

    Attributes:
        options: of the method, where they differ from its own defaults.
        true_sequential, dense_target, tune_steps: of the walk through the model; see
            `thanos_deploy.prune`.
    """

    options: Mapping[str, Option] = field(default_factory=dict)
    true_sequential: bool = False
    dense_target: float = 0.0
    tune_steps: int = 0


class Method(Protocol):
    """What every module of this package provides.

    The options of a method are the keyword arguments of its two functions, with their defaults.

    Attributes:
        PRESETS: "paper", the setting of the method's own paper; and where those are others, "best",
            what measured best on held-out text, and "fast", what measured best of what needs no
            pass of the dense model.
    """

    PRESETS: Mapping[str, Preset]

    def prune(self, problem: "LayerProblem", pattern: Pattern, **options: Option) -> "LayerResult":
        """Prune one linear layer."""

    def check(self, name: str, cols: int, pattern: Pattern, **options: Option) -> None:
        """Refuse what `prune` could not do for a layer of so many inputs."""


def names() -> list[str]:
    """Names of the methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Method:
    """A method by its name, imported now."""
    return cast(Method, import_module(f"{__name__}.{name}"))


def preset(name: str, which: str) -> Preset:
    """A preset of a method; the paper's setting where no better one is known."""
    presets = load(name).PRESETS
    return presets.get(which, presets["paper"])


def resolve(name: str, given: Mapping[str, Option]) -> dict[str, Option]:
    """All options of a method: those given, and the method's own defaults for the others.

    Raises:
        UsageError: the method has no such option.
    """
    parameters = inspect.signature(load(name).prune).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in given:
        if option not in defaults:
            raise UsageError(
                f"method {name} has no option {option.replace('_', ' ')!r}",
                fix=f"leave it out; {name} takes {', '.join(defaults) or 'none'}",
            )
    return {**defaults, **given}


def check_group(name: str, cols: int, pattern: Pattern) -> None:
    """Refuse a layer whose inputs do not divide into the groups of an n:m pattern.

    Raises:
        ModelError: they do not.
    """
    if isinstance(pattern, SemiStructured) and cols % pattern.group:
        raise ModelError(
            f"{name}: {cols} inputs do not divide into the groups of {pattern.group} of pattern "
            f"{pattern}",
            fix="use a pattern whose group divides the number of inputs",
        )


def check_blocks(name: str, block_columns: int, pattern: Pattern) -> None:
    """Refuse blocks of columns that would cut through the groups of an n:m pattern.

    Raises:
        UsageError: the block size is not a positive multiple of the group.
    """
    group = pattern.group if isinstance(pattern, SemiStructured) else 1
    if block_columns < 1 or block_columns % group:
        raise UsageError(
            f"{name}: blocks of {block_columns} columns for pattern {pattern}",
            fix=f"use a --block-size that is a positive multiple of {group}",
        )
