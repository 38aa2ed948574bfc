"""Leave those layers dense whose pruning would change the model most for what it saves.

One walk through the dense model prunes the layers of every block, one group at a time. A group
holds the layers that read one input, which servers multiply as one matrix. Tokens then pass through
the block with only that group pruned. The loss of the group is the mean over the tokens of
|z - t|^2 / |t|^2, where t is the output of the dense block and z its output now: the change
relative to the size of what the next block reads, as in tuning. Of all sets of groups that a budget
allows to stay dense, the set with the largest total loss stays dense. A budget counts weights, all
of which a decode step reads, or seconds of a step; see `forecast.savings`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.blocks import BlockInputs
from thanos_deploy.calibration.collect import Count
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.errors import UsageError
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import products_in
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.budget import Choice
from thanos_deploy.pruning.knapsack import best_that_fit
from thanos_deploy.pruning.layers import gather
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.turn import prune_turn

# Relative tolerance for rounding in sums, so that groups that fill the room exactly still fit.
_ROUNDING = 1e-9

# Fraction of the calibration data that passes through a block once for each of its groups.
SHARE = 1 / 4


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of a block that read one input.

    Attributes:
        layers: full names of those that are to be pruned.
        weights: number of their weights.
        lost: relative change of the block's output if only these layers are pruned.
    """

    layers: tuple[str, ...]
    weights: int
    lost: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much pruning each group of one block would change its output.

    Attributes:
        groups: in the order of the forward pass; empty if nothing is to be pruned.
        seconds: time that the survey of the block took, by activity; see `layers.ACTIVITIES`.
    """

    groups: tuple[Group, ...]
    seconds: Mapping[str, float]


def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    *,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[Sensitivity] | None = None,
    on_progress: OnProgress = silent,
) -> list[Sensitivity]:
    """Measure what pruning each group alone would change, in one walk through the dense model.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        patterns: the pattern of each layer, by its full name.
        recipe: how to prune; its `walk` is not used here.
        device: where each block is while it is surveyed.
        hold: see `layers.prune`.
        journal: see `layers.prune`.
        on_progress: called after every finished block.

    Raises:
        HessianError: a weight is not finite.
        UsageError: the model has experts.
    """
    check(checkpoint)
    forward = DTYPES[recipe.forward_on(device)]

    def look(visit: Visit) -> Sensitivity:
        with memory_for(f"block {visit.index}"):
            return Sensitivity(_groups(visit, patterns, recipe, forward), visit.clock.seconds)

    with torch.no_grad(), products_in(torch.float32):
        return visit_blocks(
            checkpoint,
            segments,
            look,
            forward=forward,
            journal=journal,
            device=device,
            hold=hold,
            on_progress=on_progress,
        )


def check(checkpoint: Checkpoint) -> None:
    """Refuse a model whose groups of layers are too many to be measured.

    Raises:
        UsageError: the model has experts, each with layers of its own.
    """
    if checkpoint.family.experts is not None:
        raise UsageError(
            f"--keep-dense or --budget for a {checkpoint.config.model_type} model: the "
            "experts have so many layers that measuring each would take longer than "
            "pruning all of them",
            fix="name the layers that are to stay dense with --ignore",
        )


def _groups(
    visit: Visit, patterns: Mapping[str, Pattern], recipe: Recipe, products: torch.dtype
) -> tuple[Group, ...]:
    """Measure the groups of a block; its weights are restored."""
    dense = {
        name: matrix(visit.block.get_submodule(name)).clone() for name in visit.structure.linears
    }
    running = visit.walk.block
    pruned: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for groups, statistics in gather(visit, patterns, Walk()):
        with visit.clock.measure("solve"):
            prune_turn(visit, groups, statistics, patterns, recipe, products)
            for group in groups:
                pruned[tuple(group)] = {
                    name: running.get_submodule(name).get_parameter("weight").clone()
                    for name in group
                }
                for name in group:
                    visit.write(name, dense[name])
    if not pruned:
        visit.clock.seconds.setdefault("collect", 0.0)
        return ()
    with visit.clock.measure("collect"):
        lost = _changes(visit, {group[0]: weights for group, weights in pruned.items()})
    return tuple(
        Group(
            tuple(visit.prefix + name for name in group),
            sum(weight.numel() for weight in weights.values()),
            lost[group[0]],
        )
        for group, weights in pruned.items()
    )


def _changes(visit: Visit, instead: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Measure how much replacing some weights of a block changes its output.

    Args:
        visit: the block.
        instead: by the name of each trial, the weights to use, by the names of their layers.

    Returns:
        by the name of each trial, the mean over tokens of |change of output|^2 / |output|^2.
    """
    walk = visit.walk

    def count(_: int, batch: BlockInputs, counted: Count) -> None:
        rows = slice(0, max(1, int(SHARE * batch.shape[0])))
        left = batch.forward(walk.index, walk.block, rows).float()
        size = left.square().sum(dim=-1).clamp(min=1e-30)
        for name, weights in instead.items():
            with _swapped(walk.block, weights):
                change = batch.forward(walk.index, walk.block, rows).float() - left
            # The Hessian of a single input is the sum of its squares.
            relative = (change.square().sum(dim=-1) / size).sqrt().reshape(-1, 1)
            counted.of(name, relative).add(relative, None)

    found = walk.summed(list(instead), count)
    return {name: float(one.hessian) / one.mass for name, one in found.items()}


@contextmanager
def _swapped(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give layers other weights until the end of the `with` statement, without a copy."""
    parameters = {name: block.get_submodule(name).get_parameter("weight") for name in weights}
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = weights[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def choose(
    found: Sequence[Sensitivity], saves: Mapping[tuple[str, ...], float], room: float
) -> tuple[Choice, ...]:
    """Choose the groups that stay dense: the set with the largest total loss that fits the room.

    A group whose pruning saves nothing stays dense and takes no room.

    Args:
        found: the measurements of every block, from `survey`.
        saves: what pruning each group saves, by the names of its layers.
        room: largest total saving that is given up by the groups that stay dense.

    Returns:
        the decision about each group, in the order of the forward pass.
    """
    groups = [group for block in found for group in block.groups]
    dear = [group for group in groups if saves[group.layers] > 0.0]
    kept = best_that_fit(
        [group.lost for group in dear],
        [saves[group.layers] for group in dear],
        room * (1.0 + _ROUNDING),
    )
    dense = {dear[number].layers for number in kept}
    return tuple(
        Choice(
            group.layers,
            saves[group.layers],
            group.lost,
            saves[group.layers] <= 0.0 or group.layers in dense,
        )
        for group in groups
    )


def weights_of(found: Sequence[Sensitivity]) -> dict[tuple[str, ...], float]:
    """The number of weights of each group, for a budget of weights."""
    return {group.layers: float(group.weights) for block in found for group in block.groups}
