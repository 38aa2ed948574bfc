"""Choose the widths to which the blocks of a model are cut.

The widths are chosen before anything is cut, from what each block would lose; `survey` measures
these losses, and `cut` makes the model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from thanos_deploy.errors import UsageError
from thanos_deploy.model import widths
from thanos_deploy.model.block import BlockPlan as BlockPlan
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.widths import Widths
from thanos_deploy.shrink import experts
from thanos_deploy.shrink.options import Part, Sizing
from thanos_deploy.shrink.steps import channel_steps

# How much more a change of the attention output harms a model than an equal change of the
# feed-forward output: a factor of 1.5 to 2.2 was measured; see benchmarks/LOG.md.
HEADS_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Numbers of parameters of one block and its parts.

    Attributes:
        block: of the whole block.
        head: of one query head; with its key and value if each query head has its own.
        kv_head: of one key-value head; 0 if each query head has its own.
        channel: of one feed-forward channel.
    """

    block: int
    head: int
    kv_head: int
    channel: int

    def removed(self, before: Widths, after: Widths) -> int:
        """Return the number of parameters that a cut removes."""
        return (
            (before.heads - after.heads) * self.head
            + (before.kv_heads - after.kv_heads) * self.kv_head
            + (before.channels - after.channels) * self.channel
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """How much a cut would change the output of a block, for each width.

    A loss is the mean of |change|^2 / |hidden state|^2 over the calibration tokens, after the
    refit.

    Attributes:
        heads: key-value heads that stay -> query heads that stay -> loss.
        channels: feed-forward channels that stay -> loss.
        seconds: time of the measurement, by activity; see `layers.ACTIVITIES`.
        experts: for a block with experts, number of experts that stay -> the share of all experts'
            contribution to the hidden states that is lost; see `experts.dropped`. `heads` and
            `channels` are empty then.
    """

    heads: Mapping[int, Mapping[int, float]]
    channels: Mapping[int, float]
    seconds: Mapping[str, float]
    experts: Mapping[int, float] = field(default_factory=dict)

    def of(self, width: Widths) -> float:
        """Return the loss of attention and feed-forward together; NaN if it was not measured."""
        if not self.heads:
            return self.experts.get(width.experts, math.nan)
        attention = self.heads[width.kv_heads][width.heads]
        return HEADS_WEIGHT * attention + self.channels[width.channels]


@dataclass(frozen=True, slots=True)
class Plan:
    """The planned widths of a model.

    Attributes:
        blocks: the planned widths of each block.
        stock: whether a stock config.json can describe the result.
    """

    blocks: tuple[BlockPlan, ...]
    stock: bool

    @property
    def widths(self) -> tuple[Widths, ...]:
        """The widths of every block after the cut."""
        return tuple(block.after for block in self.blocks)

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the blocks that are not dropped."""
        return tuple(number for number, one in enumerate(self.blocks) if not one.after.dropped)

    @property
    def drops_blocks(self) -> bool:
        """Whether whole blocks are dropped."""
        return len(self.kept) < len(self.blocks)

    @property
    def widths_of_kept(self) -> tuple[Widths, ...]:
        """The same as `widths`, but with the old widths for blocks that are dropped."""
        return tuple(one.before if one.after.dropped else one.after for one in self.blocks)

    @property
    def removed(self) -> float:
        """Fraction of the blocks' parameters that is removed."""
        before = sum(block.parameters_before for block in self.blocks)
        return 1.0 - sum(block.parameters_after for block in self.blocks) / before


def cost(checkpoint: Checkpoint, index: int) -> Cost:
    """Count the parameters of one block and its parts, from the shapes in the checkpoint."""
    family, width = checkpoint.family, checkpoint.widths[index]
    sizes = checkpoint.entries_of_block(index)

    def parameters(layer: str, of: int, *, bias: bool = True) -> int:
        """Return the parameters of one of `of` equal parts of a layer."""
        names = [f"{layer}.weight", *([f"{layer}.bias"] if bias else [])]
        return sum(sizes.get(name, 0) for name in names) // of

    heads, channels = family.heads, family.channels
    query, *others = heads.producers
    if others:
        queries = parameters(query, width.heads)
        keys = sum(parameters(name, width.kv_heads) for name in others)
    else:  # one matrix for queries, keys and values
        queries = parameters(query, width.heads + 2 * width.kv_heads)
        keys = 2 * queries
    own = heads.kv_count is None
    return Cost(
        block=sum(sizes.values()),
        head=queries + parameters(heads.consumer, width.heads, bias=False) + (keys if own else 0),
        kv_head=0 if own else keys,
        channel=sum(parameters(name, width.channels) for name in channels.producers)
        + parameters(channels.consumer, width.channels, bias=False),
    )


def layouts(width: Widths) -> list[tuple[int, int]]:
    """Return the (query heads, key-value heads) that can stay, largest first; see `drop_heads`."""
    group = width.heads // width.kv_heads
    same_groups = {(group * kept, kept) for kept in range(1, width.kv_heads + 1)}
    smaller_groups = {(kept * width.kv_heads, width.kv_heads) for kept in range(1, group + 1)}
    return sorted(same_groups | smaller_groups, reverse=True)


def candidates(checkpoint: Checkpoint, fraction: float, sizing: Sizing) -> list[Widths]:
    """Return the widths that remove at least a fraction of a block's parameters, and little more.

    There is one candidate for each possible number of heads, with the largest number of channels
    that removes enough.

    Args:
        checkpoint: the model, all of whose blocks have the same widths.
        fraction: fraction of a block's parameters.
        sizing: what may be cut. Heads are never cut if the family forbids it. With the allocation
            "uniform", only widths that a stock config.json can describe are returned, unless the
            part is "heads" and the family's config.json does not state the head size.

    Raises:
        UsageError: there are no such widths; the message names the largest possible fraction.
    """
    width, prices, part = checkpoint.widths[0], cost(checkpoint, 0), sizing.part
    stock, steps = _stock_only(checkpoint, sizing), channel_steps(width.channels, sizing.multiple)
    wanted = math.ceil(fraction * prices.block - 1e-6)
    found, nearest = [], 0
    stay = part == "ffn" or checkpoint.family.heads.fixed
    for heads, kv_heads in [(width.heads, width.kv_heads)] if stay else layouts(width):
        uncut = Widths(heads, kv_heads, width.channels)
        if stock and widths.describe(checkpoint.config, checkpoint.family, [uncut]) is None:
            continue
        missing = wanted - prices.removed(width, uncut)
        if missing <= 0:
            found.append(uncut)
        elif part != "heads":
            enough = width.channels - math.ceil(missing / prices.channel)
            found += [Widths(heads, kv_heads, step) for step in steps if step <= enough][:1]
        least = steps[-1] if steps and part != "heads" else width.channels
        nearest = max(nearest, prices.removed(width, Widths(heads, kv_heads, least)))
    if not found:
        most = math.floor(1000 * nearest / prices.block) / 1000
        raise UsageError(
            f"{checkpoint.folder}: no {'heads or channels' if part == 'both' else part} would be "
            f"left in a block with {fraction:.1%} of its parameters removed ({width.heads} heads, "
            f"{width.kv_heads} key-value heads, {width.channels} channels in steps of "
            f"{-steps.step})",
            fix=f"remove at most structured:{most:g}"
            + ("" if part == "both" else ", or use --shrink both"),
        )
    return found


def even(checkpoint: Checkpoint, fraction: float) -> tuple[Widths, ...]:
    """Return, for each block, the candidate that cuts heads and channels most evenly.

    This needs no measured losses. In a model with experts, experts are removed instead.

    Raises:
        UsageError: see `candidates`.
    """
    if checkpoint.family.experts is not None:
        return experts.planned(checkpoint, fraction, Sizing())
    found = candidates(checkpoint, fraction, Sizing())
    before = checkpoint.widths[0]
    chosen = min(
        found,
        key=lambda after: abs(after.heads / before.heads - after.channels / before.channels),
    )
    return (chosen,) * len(checkpoint.widths)


def check(checkpoint: Checkpoint, fraction: float, sizing: Sizing) -> None:
    """Refuse a cut that `plan` could not make, before anything is computed.

    Raises:
        UsageError: nothing would be left; the multiple is larger than the number of channels; only
            heads are to be cut and the family forbids it; or experts are to be cut out of a model
            without experts.
    """
    if checkpoint.family.experts is not None:
        experts.planned(checkpoint, fraction, sizing)
        return
    if sizing.part == "experts":
        raise UsageError(
            f"{checkpoint.folder}: a {checkpoint.config.model_type} model has no experts",
            fix="use --shrink heads, ffn or both",
        )
    if sizing.part == "heads" and (reason := checkpoint.family.heads.fixed):
        raise UsageError(
            f"{checkpoint.folder}: no attention head can be cut out: {reason}",
            fix="use --shrink ffn",
        )
    channels = checkpoint.widths[0].channels
    if sizing.multiple is not None and not 0 < sizing.multiple <= channels:
        raise UsageError(
            f"--ffn-multiple {sizing.multiple}: a block has {channels} channels",
            fix=f"use a multiple from 1 to {channels}",
        )
    candidates(checkpoint, fraction, sizing)


def _stock_only(checkpoint: Checkpoint, sizing: Sizing) -> bool:
    """Whether only widths are allowed that a stock config.json can describe."""
    heads_alone = sizing.part == "heads" and not checkpoint.family.heads.free_size
    return sizing.allocation == "uniform" and not heads_alone


def plan(
    checkpoint: Checkpoint,
    losses: Sequence[Losses],
    fraction: float,
    sizing: Sizing,
) -> Plan:
    """Choose the widths at which the predicted loss, summed over the blocks, is smallest.

    Args:
        checkpoint: the model.
        losses: the losses of each block, from `survey`.
        fraction: fraction of the blocks' parameters to remove.
        sizing: how to choose the widths.

    Raises:
        UsageError: see `check`.
    """
    check(checkpoint, fraction, sizing)
    if checkpoint.family.experts is not None:
        return _of_experts(checkpoint, losses, experts.planned(checkpoint, fraction, sizing))
    if sizing.allocation == "uniform":
        found = candidates(checkpoint, fraction, sizing)
        after = [min(found, key=lambda width: sum(loss.of(width) for loss in losses))] * len(losses)
    else:
        after = _by_loss(checkpoint, losses, fraction, sizing.part)
    blocks: list[BlockPlan] = []
    for index, (before, width, loss) in enumerate(
        zip(checkpoint.widths, after, losses, strict=True)
    ):
        price = cost(checkpoint, index)
        left = price.block - price.removed(before, width)
        blocks.append(BlockPlan(before, width, price.block, left, loss.of(width)))
    stock = widths.describe(checkpoint.config, checkpoint.family, after) is not None
    return Plan(tuple(blocks), stock)


def _of_experts(checkpoint: Checkpoint, losses: Sequence[Losses], after: Sequence[Widths]) -> Plan:
    """Return the plan for given widths of a model with experts, with its predicted losses."""
    blocks = [
        BlockPlan(
            before,
            width,
            experts.block_parameters(checkpoint, before, index),
            experts.block_parameters(checkpoint, width, index),
            0.0 if width == before else loss.of(width),
        )
        for index, (before, width, loss) in enumerate(
            zip(checkpoint.widths, after, losses, strict=True)
        )
    ]
    stock = widths.describe(checkpoint.config, checkpoint.family, after) is not None
    return Plan(tuple(blocks), stock)


def _by_loss(
    checkpoint: Checkpoint, losses: Sequence[Losses], fraction: float, part: Part
) -> list[Widths]:
    """Cut greedily where the loss per removed parameter is smallest, until enough are removed.

    Not every layout of heads can be reached from every other one, so a step is left out if the
    parameters that are still missing could not be removed after it.
    """
    after = list(checkpoint.widths)
    prices = [cost(checkpoint, index) for index in range(len(after))]
    missing = math.ceil(fraction * sum(price.block for price in prices) - 1e-6)

    def fewer_heads(index: int, width: Widths) -> Iterator[Widths]:
        if part != "ffn" and not checkpoint.family.heads.fixed:
            for kv_heads, changes in losses[index].heads.items():
                for heads in changes:
                    fits = heads <= width.heads and kv_heads <= width.kv_heads
                    if fits and (heads, kv_heads) != (width.heads, width.kv_heads):
                        yield Widths(heads, kv_heads, width.channels)

    def fewer_channels(index: int, width: Widths) -> Iterator[Widths]:
        if part != "heads":
            for channels in losses[index].channels:
                if channels < width.channels:
                    yield Widths(width.heads, width.kv_heads, channels)

    @cache
    def removable(index: int, width: Widths) -> int:
        """Return the largest number of parameters that a block can still lose."""
        return sum(
            max((prices[index].removed(width, one) for one in fewer(index, width)), default=0)
            for fewer in (fewer_heads, fewer_channels)
        )

    spare = sum(removable(index, width) for index, width in enumerate(after)) - missing

    def given_up(index: int, width: Widths) -> int:
        """Return how many parameters become impossible to remove by a step."""
        removed = prices[index].removed(after[index], width)
        return removable(index, after[index]) - removed - removable(index, width)

    while missing > 0:
        index, width = min(
            (
                (index, width)
                for index in range(len(after))
                for fewer in (fewer_heads, fewer_channels)
                for width in fewer(index, after[index])
                if given_up(index, width) <= spare
            ),
            key=lambda step: (
                (losses[step[0]].of(step[1]) - losses[step[0]].of(after[step[0]]))
                / prices[step[0]].removed(after[step[0]], step[1])
            ),
        )
        spare -= given_up(index, width)
        missing -= prices[index].removed(after[index], width)
        after[index] = width
    return after
