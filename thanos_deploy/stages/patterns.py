"""The pattern of each linear layer: as requested, and as a survey of the model changes it."""

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
    """Return the requested pattern of each linear layer that is to be pruned, by full name."""
    return assignment.assign(
        source.linears,
        recipe.pattern,
        include=recipe.layers.include,
        ignore=recipe.layers.ignore,
        file=sparsity_file(recipe),
    )


def sparsity_file(recipe: Recipe) -> assignment.SparsityFile | None:
    """Read the recipe's file with patterns for single layers; None if it names no file."""
    if recipe.layers.sparsity_file is None:
        return None
    return assignment.read_file(Path(recipe.layers.sparsity_file).expanduser())


def measured_hash(recipe: Recipe) -> str | None:
    """Return the SHA-256 of the budget's file of measured matrix products; None without a file.

    Raises:
        InputError: the file cannot be read.
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
    """Return the pattern that OWL gives each layer, from the outliers counted in each block.

    Args:
        source: the dense model.
        how: the options of OWL.
        sparsity: the sparsity of the whole model.
        layers: full names of the layers that are to be pruned.
        outliers: the outliers of every block, in order.
    """
    shapes = pruning.linear_shapes(source)
    blocks = [
        {name: math.prod(shapes[name]) for name in block.full_names if name in layers}
        for block in source.blocks
    ]
    return owl.allocate([block.ratio for block in outliers], blocks, sparsity, how)


def choices_of(source: Checkpoint, recipe: Recipe, tried: Sequence[Sensitivity]) -> Choices:
    """Choose the layers that stay dense, under a budget of time or, with --keep-dense, of weights.

    Args:
        source: the dense model.
        recipe: a recipe with one of these two budgets.
        tried: for every block, how much pruning each group of layers changes the model.
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
    """Return what pruning each group of layers would save, without measuring the loss it causes.

    A group that would save nothing is marked as dense. None without a budget of time.

    Raises:
        UsageError: even pruning all layers does not reach the speed of the budget.
    """
    if recipe.budget is None:
        return None
    saved = savings(source, assigned(source, recipe), recipe.budget)
    saved.room(recipe.budget)
    groups = (Choice(one, saves, nan, saves <= 0.0) for one, saves in saved.seconds.items())
    return saved.choices(recipe.budget, tuple(groups))
