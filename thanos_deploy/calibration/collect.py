"""Run calibration data through a block, and collect the statistics of what its layers read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from thanos_deploy.calibration.blocks import BlockInputs
from thanos_deploy.calibration.passes import Pass, inputs_until, recorded
from thanos_deploy.calibration.statistics import ShardSums, Statistics
from thanos_deploy.ranks.group import current


class Count:
    """Statistics of one shard, which a first batch begins.

    Attributes:
        by_name: of a layer, or of whatever else is counted.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Statistics] = {}

    def of(self, name: str, x: Tensor, target: Tensor | None = None) -> Statistics:
        """Those to which [tokens, cols] are added, and [tokens, cols] beside them if any are."""
        if name not in self.by_name:
            beside = None if target is None else target.shape[1]
            self.by_name[name] = Statistics.empty(x.shape[1], beside, device=x.device)
        return self.by_name[name]


@dataclass(slots=True)
class Walk:
    """Calibration data on its way through the blocks of one model.

    Attributes:
        index: number of the next block.
        block: that block, with weights.
        batches: what enters it, in the dtype of the weights, of all ranks.
        left: numbers of the batches that have left it.
    """

    index: int
    block: nn.Module
    batches: Sequence[BlockInputs]
    left: set[int] = field(default_factory=set)

    @property
    def own(self) -> list[int]:
        """Numbers of the batches of this rank."""
        return [n for n, batch in enumerate(self.batches) if current().has(batch.shard)]

    @property
    def done(self) -> bool:
        """All of these have left the block."""
        return self.left.issuperset(self.own)

    def summed(
        self, names: Sequence[str], count: Callable[[int, BlockInputs, Count], object]
    ) -> dict[str, Statistics]:
        """The sums of statistics over the batches of which they are taken, on every rank.

        Args:
            names: what there are statistics of, in the order of the result.
            count: called with the number of each batch of this rank, with the batch, and with
                what it is to add to.

        Returns:
            by these names.
        """
        shards = 1 + max(batch.shard for batch in self.batches if batch.counted)
        sums = ShardSums(current(), shards, names)
        for shard in sums.shards:
            counted = Count()
            for number, batch in enumerate(self.batches):
                if batch.shard == shard:
                    count(number, batch, counted)
            sums.add(counted.by_name)
        return sums.finish()


def collect(
    walk: Walk,
    names: list[str],
    dense: Walk | None = None,
    *,
    pause: bool = False,
    last: bool = False,
    routed: Collection[str] = (),
) -> dict[str, Statistics]:
    """Run the data into a block, as far as the last of some linear layers.

    Args:
        walk: the model that is being pruned.
        names: linear layers of the block, in the order in which the forward pass reaches them.
        dense: the same data in the dense model, at the same block, for `Statistics.cross`.
        pause: let the forward passes wait there, and the next `collect` or `advance` go on from
            there; so no layer before the last of these may change any more.
        last: no more is wanted of this block; so the dense model's data, for which nothing changes,
            leaves it at once, and what its passes hold is free.
        routed: layers of experts. In the dense model the router sends them other tokens, so they
            have no `Statistics.cross`.

    Returns:
        layer name -> statistics.
    """

    def count(number: int, batch: BlockInputs, counted: Count) -> None:
        inputs = _inputs_of(walk, names, batch, pause=pause)
        targets = {}
        if dense is not None:
            beside = dense.batches[number]
            if last:
                read = _leave(dense, number, names)
            else:
                read = _inputs_of(dense, names, beside, pause=pause)
            targets = {name: y for name, y in read.items() if name not in routed}
        for name, x in inputs.items():
            counted.of(name, x, targets.get(name)).add(x, targets.get(name))

    return walk.summed(names, count)


def collect_relative(walk: Walk, names: list[str]) -> dict[str, Statistics]:
    """Run the data through a block, and weigh each token by 1 / |h|^2 with h what leaves the block.

    A layer that writes to the stream of hidden states then counts for what it changes of each
    token in proportion to that token's size, which is what the next norm makes of it. Blocks
    become comparable, and the few tokens with huge activations do not outweigh all others.

    Args:
        walk: the model.
        names: linear layers of the block.

    Returns:
        layer name -> statistics.
    """

    def count(_: int, batch: BlockInputs, counted: Count) -> None:
        inputs: dict[str, Tensor] = {}
        with recorded(walk.block, names, inputs):
            hidden = batch.forward(walk.index, walk.block)
        weight = hidden.reshape(-1, hidden.shape[-1]).float().square().sum(dim=1, keepdim=True)
        for name, x in inputs.items():
            counted.of(name, x).add_weighted(x.float(), weight.clamp(min=1e-30).reciprocal())

    return walk.summed(names, count)


def collect_norms(walk: Walk, entrances: Mapping[str, nn.Module]) -> dict[str, Statistics]:
    """Run the data through a block, and add up the norms of what some modules are called with.

    Args:
        walk: the model.
        entrances: by a name, a module of the block whose argument is [tokens, cols].

    Returns:
        by the same names: of one column, the Euclidean norm of each token.
    """

    def count(_: int, batch: BlockInputs, counted: Count) -> None:
        def add(name: str, x: Tensor) -> None:
            norms = x.float().norm(dim=-1, keepdim=True)
            counted.of(name, norms).add(norms, None)

        handles = [
            module.register_forward_pre_hook(lambda _, seen, name=name: add(name, seen[0]))
            for name, module in entrances.items()
        ]
        batch.forward(walk.index, walk.block)
        for handle in handles:
            handle.remove()

    return walk.summed(list(entrances), count)


def advance(walk: Walk) -> None:
    """Run the data through the block, or through the rest of it where passes wait, once."""
    for number in walk.own:
        if number not in walk.left:
            _leave(walk, number)


def pass_by(walk: Walk) -> None:
    """Let the data go past the block, unchanged."""
    for number in walk.own:
        walk.batches[number].leave(walk.batches[number].hidden)
        walk.left.add(number)


def _leave(walk: Walk, number: int, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Take a batch through the block, or the rest of it.

    Returns:
        [tokens, cols] for each name, what these layers read on the way.
    """
    batch = walk.batches[number]
    inputs: dict[str, Tensor] = {}
    with recorded(walk.block, names, inputs):
        batch.leave(batch.paused.finish() if batch.paused else _forward(walk, batch)())
    batch.paused = None
    walk.left.add(number)
    return inputs


def _inputs_of(
    walk: Walk, names: Sequence[str], batch: BlockInputs, *, pause: bool
) -> dict[str, Tensor]:
    """[tokens, cols] for each name, in the dtype of the pass."""
    if not pause and batch.paused is None:
        return inputs_until(_forward(walk, batch), walk.block, names)
    batch.paused = batch.paused or Pass(_forward(walk, batch))
    return batch.paused.until(walk.block, names)


def _forward(walk: Walk, batch: BlockInputs) -> Callable[[], Tensor]:
    return partial(batch.forward, walk.index, walk.block)
