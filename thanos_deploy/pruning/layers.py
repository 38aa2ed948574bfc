"""Walk a model block by block: calibrate, prune, write back, go on with the pruned block.

Each block receives the calibration data as the pruned blocks before it pass it on. Only one block's
weights are in memory at a time.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.collect import collect
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.order import turns
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.tune import tune
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.machine import devices
from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import products_in
from thanos_deploy.methods import Walk
from thanos_deploy.model.assignment import DENSE, every
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.structure import Group
from thanos_deploy.model.verdict import judge
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedBlock, PrunedLayer
from thanos_deploy.pruning.turn import prune_turn

logger = logging.getLogger(__name__)


# The activities that the time of a block is divided into: "collect", forward passes up to the
# layers, with statistics; "solve", the pruning method for all layers; "tune", optimisation steps of
# all layers together; "forward", the data's pass through the pruned block to the next block; and
# "journal", keeping the block on disk.
ACTIVITIES = ("collect", "solve", "tune", "forward", "journal")


def prune(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    recipe: Recipe,
    *,
    further: Tensor | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[PrunedBlock] | None = None,
    on_progress: OnProgress = silent,
) -> list[PrunedBlock]:
    """Prune the linear layers of every block and write an ordinary model folder.

    Embeddings, norms, biases and the output head are copied, and so are layers without a pattern.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder for the pruned model; None for a rank that writes nothing.
        recipe: how to prune.
        further: int64[count, length], tokens that only the tuning steps use; None for none.
        patterns: the pattern of each layer, by its full name; None for the recipe's pattern
            everywhere.
        dtype: dtype to store, or None to keep each tensor's own.
        device: where each block is while it is pruned.
        hold: where the data between two blocks is; see `activations.memory_for`.
        journal: keeps every finished block; blocks that it already holds are not pruned again.
        on_progress: called after every finished block.

    Returns:
        a report on each block.

    Raises:
        ModelError: weights are missing, have NaN, or do not fit the pattern.
        ResourceError: a block does not fit into the GPU's memory.
    """
    if patterns is None:
        patterns = every(checkpoint.linears, recipe.pattern)
    check(checkpoint, recipe, patterns)
    forward = DTYPES[recipe.forward_on(device)]
    if destination is not None:
        copy_companions(checkpoint.folder, destination, dtype)

    def work(visit: Visit) -> PrunedBlock:
        with devices.memory_for(f"block {visit.index}"):
            layers = _prune_block(visit, patterns, recipe, forward)
        logger.info(
            "block %d: largest relative error %.4f, %.1f s",
            visit.index,
            max(layer.relative_error for layer in layers),
            sum(visit.clock.seconds.values()),
        )
        return PrunedBlock(layers, visit.clock.seconds)

    with (
        torch.no_grad(),
        products_in(torch.float32),
        WeightsCopy(checkpoint.weights, destination, dtype) as copy,
    ):
        return visit_blocks(
            checkpoint,
            segments,
            work,
            copy=copy,
            further=further,
            with_dense=recipe.walks_dense,
            forward=forward,
            journal=journal,
            device=device,
            hold=hold,
            on_progress=on_progress,
        )


def _prune_block(
    visit: Visit,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    products: torch.dtype,
) -> tuple[PrunedLayer, ...]:
    """Prune a block's linear layers in place; report on them in the order of the forward pass."""
    layers: dict[str, PrunedLayer] = {}
    for groups, statistics in gather(visit, patterns, recipe.walk):
        with visit.clock.measure("solve"):
            layers |= prune_turn(visit, groups, statistics, patterns, recipe, products)
    if recipe.walk.tune_steps and layers:
        with visit.clock.measure("tune"):
            tune(visit, layers, recipe.walk.tune_steps)
            layers = {
                name: _judged_again(visit, name, report, patterns[report.name])
                for name, report in layers.items()
            }
    return tuple(
        layers[name] if name in layers else _leave_dense(visit, name)
        for name in visit.structure.linears
    )


def gather(
    visit: Visit,
    layers: Collection[str],
    walk: Walk,
) -> Iterator[tuple[list[Group], dict[str, Statistics]]]:
    """Yield the groups of layers that are pruned in each turn, with the statistics of their inputs.

    A group holds the layers that read one input, by their names relative to the block. Statistics
    are keyed by the first name of each group and are collected when their turn comes.

    Args:
        visit: the block.
        layers: full names of the layers that are to be pruned.
        walk: how to divide the layers into turns, see `order.turns`; and whether to collect
            `Statistics.cross`, which layers of experts never have.
    """
    inputs = {
        name: matrix(visit.block.get_submodule(name)).shape[1]
        for name in visit.structure.linears
        if visit.prefix + name in layers
    }
    taken = turns(visit.structure, inputs, true_sequential=walk.true_sequential)
    for turn, together in enumerate(taken, start=1):
        with visit.clock.measure("collect"):
            statistics = collect(
                visit.walk,
                [group[0] for group in together],
                visit.dense if walk.dense_target else None,
                pause=walk.true_sequential and visit.can_wait,
                last=turn == len(taken),
                routed=visit.structure.routed,
            )
        yield together, statistics


def _judged_again(visit: Visit, linear: str, report: PrunedLayer, pattern: Pattern) -> PrunedLayer:
    """Update the report on a layer whose weight has changed since."""
    verdict = judge(matrix(visit.block.get_submodule(linear)) != 0, pattern)
    return replace(report, sparsity=verdict.sparsity, pattern_holds=verdict.holds)


def _leave_dense(visit: Visit, linear: str) -> PrunedLayer:
    """Have one layer written unchanged, and report on it."""
    visit.untouched.add(f"{linear}.weight")
    # If the model is stored in another dtype, the weight is rounded to it.
    weight = visit.write(linear, matrix(visit.block.get_submodule(linear)))
    return PrunedLayer(
        name=visit.prefix + linear,
        rows=weight.shape[0],
        cols=weight.shape[1],
        pattern=DENSE,
        sparsity=1.0 - int(weight.count_nonzero()) / weight.numel(),
        pattern_holds=True,
        relative_error=0.0,
        damping=0.0,
        solver="none",
        failures=(),
        seconds=0.0,
    )


def check(checkpoint: Checkpoint, recipe: Recipe, patterns: Mapping[str, Pattern]) -> None:
    """Refuse, before anything is computed, layers that the method cannot prune.

    Args:
        checkpoint: the model.
        recipe: how to prune it.
        patterns: the pattern of each layer, by its full name.

    Raises:
        ModelError: a layer is missing or does not fit the pattern.
        UsageError: the options do not fit the method or the pattern.
    """
    method, shapes = methods.load(recipe.method), linear_shapes(checkpoint)
    for name, pattern in every(shapes, patterns).items():
        method.check(name, shapes[name][1], pattern, recipe.options)


def short_names(checkpoint: Checkpoint, layers: Collection[str]) -> list[str]:
    """Names, relative to the block, of the linear layers that are pruned in at least one block.

    Args:
        checkpoint: the model.
        layers: full names of the layers that are to be pruned.
    """
    every = dict.fromkeys(name for block in checkpoint.blocks for name in block.linears)
    return [
        name for name in every if any(block.prefix + name in layers for block in checkpoint.blocks)
    ]


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Shapes (rows, cols) of all linear layers that pruning visits, by full name, from headers."""
    shapes = {}
    for name in checkpoint.linears:
        rows, cols = checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight")]
        shapes[name] = (cols, rows) if checkpoint.family.transposed else (rows, cols)
    return shapes
