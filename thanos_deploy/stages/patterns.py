"""What each linear layer is to be pruned to: as asked for, and after a survey of the model."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from math import nan
from pathlib import Path

from thanos_deploy.errors import InputError
from thanos_deploy.forecast.savings import savings
from thanos_deploy.model import assignment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning import layers as pruning
from thanos_deploy.pruning import owl
from thanos_deploy.pruning import sensitivity as sensitive
from thanos_deploy.pruning.budget import Choice, Choices
from thanos_deploy.pruning.owl import Outliers
from thanos_deploy.pruning.recipe import Owl, Recipe
from thanos_deploy.pruning.sensitivity import Sensitivity


def assigned(source: Checkpoint, recipe: Recipe) -> dict[str, Pattern]:
    """What is asked of every linear layer that is to be pruned, by its full name."""
    return assignment.assign(
        source.linears,
        recipe.pattern,
        include=recipe.layers.include,
        ignore=recipe.layers.ignore,
        file=sparsity_file(recipe),
    )


def sparsity_file(recipe: Recipe) -> assignment.SparsityFile | None:
    """The file of layers with patterns of their own, if a recipe names one."""
    if recipe.layers.sparsity_file is None:
        return None
    return assignment.read_file(Path(recipe.layers.sparsity_file).expanduser())


def measured_hash(recipe: Recipe) -> str | None:
    """SHA-256 of the file of measured matrix products that a budget names, if it names one.

    Raises:
        InputError: it cannot be read.
    """
    if recipe.budget is None or recipe.budget.measured is None:
        return None
    path = Path(recipe.budget.measured).expanduser()
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: not readable ({error.strerror})", fix="correct --budget-measured"
        ) from error


def allocated(
    source: Checkpoint,
    how: Owl,
    sparsity: float,
    layers: Collection[str],
    outliers: Sequence[Outliers],
) -> Mapping[str, Pattern]:
    """The pattern of every layer, by how many outliers each block has."""
    shapes = pruning.linear_shapes(source)
    blocks = [
        {name: math.prod(shapes[name]) for name in block.full_names if name in layers}
        for block in source.blocks
    ]
    return owl.allocate([block.ratio for block in outliers], blocks, sparsity, how)


def choices_of(source: Checkpoint, recipe: Recipe, tried: Sequence[Sensitivity]) -> Choices:
    """Which layers stay dense: under a budget of time or, with --keep-dense, of weights.

    Args:
        source: the dense model.
        recipe: with either of them.
        tried: what pruning each group of layers changes, of every block.
    """
    if recipe.budget is None:
        share, weights = recipe.layers.keep_dense, sensitive.weights_of(tried)
        whole = sum(weights.values())
        groups = sensitive.choose(tried, weights, share * whole)
        return Choices("weights", whole, "", share, groups)
    saved = savings(source, assigned(source, recipe), recipe.budget)
    groups = sensitive.choose(tried, saved.seconds, saved.room(recipe.budget))
    return saved.choices(recipe.budget, groups)


def possible_choices(source: Checkpoint, recipe: Recipe) -> Choices | None:
    """What each group of layers would save, with nothing measured of what pruning it costs.

    Raises:
        UsageError: no choice of layers is as fast as the budget wants.
    """
    if recipe.budget is None:
        return None
    saved = savings(source, assigned(source, recipe), recipe.budget)
    saved.room(recipe.budget)
    groups = (Choice(one, saves, nan, saves <= 0.0) for one, saves in saved.seconds.items())
    return saved.choices(recipe.budget, tuple(groups))
