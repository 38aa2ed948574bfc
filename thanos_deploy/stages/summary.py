"""Summaries of the reports on all blocks, for the result of the stage prune."""

import statistics
from collections.abc import Sequence

from thanos_deploy.model import assignment
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import (
    LayersSummary,
    PrunedBlock,
    Retry,
    WidthsSummary,
    patterns_in,
)
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Plan
from thanos_deploy.solver.damping import damping_of


def of_layers(blocks: Sequence[PrunedBlock], recipe: Recipe) -> LayersSummary:
    """Summarise a model pruned to zeros: the patterns of its layers, and their errors."""
    layers = [layer for block in blocks for layer in block.layers]
    patterns = patterns_in(blocks, recipe.pattern)
    pruned = [layer for layer in layers if layer.name in patterns]
    worst = max(pruned, key=lambda layer: layer.relative_error)
    weights = sum(layer.rows * layer.cols for layer in layers)
    damping = damping_of(recipe.options).damping
    return LayersSummary(
        layers=len(layers),
        weights=weights,
        sparsity=sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / weights,
        patterns=assignment.counts(patterns.get(layer.name) for layer in layers),
        layers_left_dense=tuple(layer.name for layer in layers if layer.name not in patterns),
        pattern_holds=all(layer.pattern_holds for layer in pruned),
        layers_off_pattern=tuple(layer.name for layer in pruned if not layer.pattern_holds),
        retries=tuple(
            Retry(layer.name, layer.solver, layer.damping, layer.failures)
            for layer in pruned
            if layer.failures or layer.damping > damping
        ),
        median_relative_error=statistics.median(layer.relative_error for layer in pruned),
        worst_relative_error=worst.relative_error,
        worst_layer=worst.name,
        largest_damping=max(layer.damping for layer in pruned),
    )


def of_cuts(blocks: Sequence[CutBlock]) -> LayersSummary:
    """Summarise the errors of the blocks of a model that was cut."""
    routed = any(block.before.experts for block in blocks)
    errors = {
        f"block {index}, {part}": error
        for index, block in enumerate(blocks)
        for part, error in _errors(block)
        if block.before != block.after or not routed
    }
    worst = max(errors, key=errors.__getitem__)
    unfitted = [
        Retry(layer, "channels by Wanda's score", 0.0, (why,))
        for block in blocks
        for layer, why in block.unfitted.items()
    ]
    return LayersSummary(
        retries=tuple(unfitted) or None,
        median_relative_error=statistics.median(errors.values()),
        worst_relative_error=errors[worst],
        worst_layer=worst,
        largest_damping=max(block.damping for block in blocks),
    )


def _errors(block: CutBlock) -> tuple[tuple[str, float], ...]:
    if block.experts or block.expert_channels:
        return (("experts", block.channels_error),)
    return ("heads", block.heads_error), ("ffn", block.channels_error)


def of_widths(plan: Plan) -> WidthsSummary:
    """Summarise planned widths: one row for each block, and the number of parameters."""
    return WidthsSummary(
        removed=plan.removed,
        stock_config=plan.stock,
        block_parameters_before=sum(block.parameters_before for block in plan.blocks),
        block_parameters_after=sum(block.parameters_after for block in plan.blocks),
        predicted_loss=sum(block.predicted_loss for block in plan.blocks) / len(plan.blocks),
        blocks=plan.blocks,
    )
