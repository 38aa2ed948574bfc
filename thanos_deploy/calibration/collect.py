"""Run calibration data through a block, and collect statistics of its layers' inputs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from thanos_deploy.calibration.blocks import BlockInputs
from thanos_deploy.calibration.passes import Pass, inputs_until, recorded
from thanos_deploy.calibration.statistics import ShardSums, Statistics
from thanos_deploy.ranks.group import current


class Count:
    """The statistics of one shard; empty until its first batch.

    Attributes:
        by_name: maps the name of a layer, or of another module, to its statistics.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Statistics] = {}

    def of(self, name: str, x: Tensor, target: Tensor | None = None) -> Statistics:
        """Return the statistics under a name, creating empty ones at the first call.

        Args:
            name: of a layer or another module.
            x: [tokens, cols], an input of the layer, for its size and device.
            target: [tokens, dense cols], the same input in the dense model; None to have no
                `Statistics.cross`.
        """
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
        batches: the batches of all ranks, whose hidden states are in the dtype of these weights.
        left: numbers of the batches that have left the block.
    """

    index: int
    block: nn.Module
    batches: Sequence[BlockInputs]
    left: set[int] = field(default_factory=set)

    @property
    def own(self) -> list[int]:
        """Numbers of this rank's batches."""
        return [n for n, batch in enumerate(self.batches) if current().owns(batch.shard)]

    @property
    def done(self) -> bool:
        """Whether all of this rank's batches have left the block."""
        return self.left.issuperset(self.own)

    def summed(
        self, names: Sequence[str], count: Callable[[int, BlockInputs, Count], object]
    ) -> dict[str, Statistics]:
        """Sum statistics over all batches with `counted` set, on every rank.

        Args:
            names: names of the statistics, in the order of the result.
            count: called for each batch of this rank with its number, the batch, and the `Count`
                to which it adds the statistics of the batch.

        Returns:
            name -> statistics.
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
    """Run the data into a block up to the last of some linear layers, and sum their statistics.

    Args:
        walk: the model that is being pruned.
        names: linear layers of the block, in the order in which the forward pass reaches them.
        dense: the same data in the dense model, at the same block, for `Statistics.cross`.
        pause: whether the forward passes wait at that layer, so that the next `collect` or
            `advance` continues from there. No layer before it may change any more then.
        last: whether this is the last call for the block. The dense block does not change, so its
            data runs to the end of the block in the same pass, which frees the pass's memory.
        routed: layers of experts. The router of the dense model sends them different tokens, so
            they have no `Statistics.cross`.

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
    """Run the data through a block, and weight each token by 1 / |h|^2, with h its block output.

    The error of a layer that writes to the residual stream is then relative to the size of each
    token's hidden state, because the next norm divides by that size. This makes blocks comparable,
    and the few tokens with huge activations do not outweigh all others.

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
    """Run the data through a block, and sum the Euclidean norms of the inputs of some modules.

    Args:
        walk: the model.
        entrances: maps a name to a module of the block whose first argument is [tokens, cols].

    Returns:
        maps the same names to statistics of one column, the Euclidean norm of each token.
    """

    def count(_: int, batch: BlockInputs, counted: Count) -> None:
        def add(name: str, x: Tensor) -> None:
            norms = x.float().norm(dim=-1, keepdim=True)
            counted.of(name, norms).add(norms, None)

        handles = [
            module.register_forward_pre_hook(lambda _, seen, name=name: add(name, seen[0]))
            for name, module in entrances.items()
        ]
        try:
            batch.forward(walk.index, walk.block)
        finally:
            for handle in handles:
                handle.remove()

    return walk.summed(list(entrances), count)


def advance(walk: Walk) -> None:
    """Run all batches that have not left the block to its end, from where their passes wait."""
    for number in walk.own:
        if number not in walk.left:
            _leave(walk, number)


def pass_by(walk: Walk) -> None:
    """Pass the hidden states on unchanged, without running the block."""
    for number in walk.own:
        walk.batches[number].leave(walk.batches[number].hidden)
        walk.left.add(number)


def _leave(walk: Walk, number: int, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Run a batch to the end of the block, from where its pass waits.

    Returns:
        layer name -> [tokens, cols], its input; for layers that the rest of the pass reaches.
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
    """Return the input of each layer, [tokens, cols], in the dtype of the pass."""
    if not pause and batch.paused is None:
        return inputs_until(_forward(walk, batch), walk.block, names)
    batch.paused = batch.paused or Pass(_forward(walk, batch))
    return batch.paused.until(walk.block, names)


def _forward(walk: Walk, batch: BlockInputs) -> Callable[[], Tensor]:
    return partial(batch.forward, walk.index, walk.block)
