"""Tune a block as a whole: a few steps of all its layers, towards the dense block.

Layers are pruned or quantised one at a time, each with the best update that one layer can have.
What that leaves is what layers can do for each other: here all of them move together, so that what
leaves the block comes nearer to what leaves it in the dense model. What a step changes of a layer
is up to its `Learner`: here the weights that pruning has kept, where zeros stay zero.

Every token counts by its error relative to its size, |z - t|^2 / |t|^2 with t what leaves the dense
block, because the norm that follows divides by it. Adam takes each step on another part of the
calibration data; its rate falls linearly to 0. A block whose error is not less afterwards is put
back to what it was.

The sequences of a step are cut into parts, the same for every number of ranks. A rank that has none
of them gets its part from the rank that has; their gradients are added up in one order, and every
rank takes the step for some of the weights.

Source of the idea: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv
2402.12419.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from thanos_deploy.calibration.blocks import BlockInputs
from thanos_deploy.calibration.collect import Walk, advance
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix, turned
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.spread import even
from thanos_deploy.ranks.sums import OrderedSum, run_of, whole_of

# Tokens that a step looks at; a segment at least.
TOKENS_PER_STEP = 1024

# Parts of a step, if it looks at so many sequences.
_PARTS = 4

# Of the weights that pruning has kept, a fraction of their root mean square, so that it fits models
# of any scale. Chosen on held-out C4 documents with SmolLM2-135M at 2:4; see benchmarks/LOG.md.
_RATE = 1e-2
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Learned:
    """Numbers that Adam changes, in place.

    Attributes:
        values: float32.
        rate: the first step's.
    """

    values: Tensor
    rate: float


class Learner(Protocol):
    """A layer's weight while its block is tuned, as a function of what steps change."""

    @property
    def learned(self) -> Sequence[Learned]:
        """What steps change, the same tensors every time."""
        ...

    def receive(self, gradient: Tensor) -> None:
        """Give everything that is learned its gradient.

        Args:
            gradient: float32, this rank's run of the gradient by the weight as the layer stores it;
                see `run_of`. All ranks receive theirs at once.
        """
        ...

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], what the layer multiplies by now, on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning a block did.

    Attributes:
        before, after: the mean over the tokens that were judged of |z - t|^2 / |t|^2. Where it is
            not less afterwards, the block is as it was before.
    """

    before: float
    after: float

    @property
    def better(self) -> bool:
        """The block is tuned; written so that NaN is not better."""
        return self.after < self.before


def tune(visit: Visit, linears: Collection[str], steps: int) -> Tuned | None:
    """Tune the kept weights of a block, in place, when all of its layers have been pruned.

    Args:
        visit: the block; its dense copy is run to the end.
        linears: names of the layers, seen from the block.
        steps: how many steps.

    Returns:
        what that did; None if no weight is left.

    Raises:
        ModelError: a value does not fit the dtype in which it is stored.
    """
    there = {name: visit.block.get_submodule(name) for name in linears}
    learners = {name: Kept(one) for name, one in there.items() if matrix(one).count_nonzero()}
    return learn(visit, learners, steps) if learners else None


class Kept:
    """The weights of a layer that are not zero; each rank takes the steps for a run of them."""

    def __init__(self, linear: nn.Module) -> None:
        """Begin with the weight as it is.

        Args:
            linear: the layer, of which one weight at least is not zero.
        """
        self._linear = linear
        weight = linear.get_parameter("weight").float()
        self._shape = weight.shape
        # A copy, as the layer has to stay as it is until the end.
        self._run = run_of(current(), weight).clone()
        self._kept = self._run != 0
        self.learned = (Learned(self._run, _RATE * _root_mean_square(weight)),)

    def receive(self, gradient: Tensor) -> None:
        """See `Learner`."""
        self._run.grad = gradient

    def weight(self, dtype: torch.dtype) -> Tensor:
        """See `Learner`."""
        run = self._run.mul_(self._kept).to(dtype)
        return turned(self._linear, whole_of(current(), run, self._shape))


def learn(visit: Visit, learners: Mapping[str, Learner], steps: int) -> Tuned:
    """Take steps for some layers of a block together, and write what they have become.

    Args:
        visit: the block; its dense copy is run to the end.
        learners: by the names of the layers, seen from the block; one at least.
        steps: how many steps.

    Raises:
        ModelError: a value does not fit the dtype in which it is stored.
    """
    walk, dense = visit.walk, visit.dense
    assert dense is not None
    advance(dense)
    for batch in walk.batches:
        batch.paused = None  # what waits in the block has passed layers that change now
    modules = [walk.block.get_submodule(name) for name in learners]
    running = [module.get_parameter("weight") for module in modules]
    learned = [one for learner in learners.values() for one in learner.learned]
    optimizer = torch.optim.Adam(
        [{"params": [one.values], "lr": one.rate} for one in learned],
        betas=_BETAS,
        eps=1e-12,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)

    def run_as_learned() -> None:
        for module, learner in zip(modules, learners.values(), strict=True):
            into = matrix(module)
            into.copy_(learner.weight(into.dtype))

    walk.block.requires_grad_(False)
    # In another dtype it is a copy of the block that runs, and the block stays as it is meanwhile.
    begun = [
        matrix(visit.block.get_submodule(name)).clone() if walk.block is visit.block else None
        for name in learners
    ]
    before = _error(visit, dense)
    for run in running:
        run.requires_grad_(True)
    for number, rows in _parts(walk.batches, steps):
        gradients = _gradients(visit, dense, number, rows, running)
        for learner, gradient in zip(learners.values(), gradients, strict=True):
            learner.receive(gradient)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run_as_learned()
    for run in running:
        run.requires_grad_(False)
    tuned = Tuned(before, _error(visit, dense))
    for (name, learner), weight in zip(learners.items(), begun, strict=True):
        if tuned.better:
            visit.write(name, learner.weight(torch.float32))
        else:
            own = matrix(visit.block.get_submodule(name))
            visit.write(name, own if weight is None else weight)
    return tuned


@dataclass(frozen=True, slots=True)
class _Errors:
    """What a rank says of a block: the mean error of the first sequence of each of its batches."""

    of_batches: tuple[float, ...]


def _error(visit: Visit, dense: Walk) -> float:
    """The mean over tokens of the first sequence of every batch; the same on all ranks."""
    own: list[float] = []
    for number in visit.walk.own:
        batch, one = visit.walk.batches[number], slice(0, 1)
        left = batch.forward_of(
            batch.hidden[one], visit.index, visit.walk.block, one, visit.tuned_in
        )
        relative = _relative(left, dense.batches[number].left[one])
        own.append(relative.double().mean().item())
    every = [error for said in current().gather(_Errors(tuple(own))) for error in said.of_batches]
    return math.fsum(every) / len(every)  # whose last bit no order of terms changes


def _relative(left: Tensor, target: Tensor) -> Tensor:
    """[sequences, tokens], |z - t|^2 / |t|^2 of what leaves a block and what should."""
    target = target.float()
    error = (left.float() - target).square().sum(dim=-1)
    return error / target.square().sum(dim=-1).clamp(min=1e-30)


def _gradients(
    visit: Visit, dense: Walk, number: int, rows: slice, running: Sequence[Tensor]
) -> list[Tensor]:
    """This rank's run of the gradient of a step's loss by each weight; float32.

    Args:
        visit: the block.
        dense: the data that has left the dense block.
        number: of a batch.
        rows: some of its sequences.
        running: the weights.
    """
    ranks, batch, beside = current(), visit.walk.batches[number], dense.batches[number]
    first, stop, _ = rows.indices(batch.shape[0])
    holder = batch.shard % ranks.size
    parts = [slice(first + one.start, first + one.stop) for one in even(stop - first, _PARTS)]
    sums = OrderedSum(ranks, len(parts), holder)
    whole = (batch.hidden, beside.left) if ranks.rank == holder else None
    for turn in range(sums.turns):
        data = _handed_over(batch, whole, parts, turn, holder)
        if (own := sums.mine(turn)) is not None:
            assert data is not None
            hidden, target = data
            with torch.enable_grad():
                left = batch.forward_of(
                    hidden, visit.index, visit.walk.block, parts[own], visit.tuned_in
                )
                loss = _relative(left, target).sum() / ((stop - first) * batch.shape[1])
                sums.add(torch.autograd.grad(loss, running))
        else:
            sums.add([torch.zeros_like(run) for run in running])
    return sums.runs()


def _handed_over(
    batch: BlockInputs,
    whole: tuple[Tensor, Tensor] | None,
    parts: Sequence[slice],
    turn: int,
    holder: int,
) -> tuple[Tensor, Tensor] | None:
    """What enters the block and what should leave it of this rank's part in a turn.

    The rank that has the batch gives the others theirs.

    Args:
        batch: that all parts are of.
        whole: the same of the batch; None on ranks that do not have it.
        parts: the sequences of each.
        turn: see `OrderedSum`.
        holder: the rank that has the batch.
    """
    ranks = current()
    mine = None
    for number in range(turn * ranks.size, min((turn + 1) * ranks.size, len(parts))):
        reader = (holder + number) % ranks.size
        if whole is not None:
            data = whole[0][parts[number]], whole[1][parts[number]]
        elif ranks.rank == reader:
            shape = (parts[number].stop - parts[number].start, *batch.shape[1:])
            data = batch.empty(shape), batch.empty(shape)
        else:
            continue
        for tensor in data:
            ranks.hand_over(tensor.contiguous(), holder, reader)
        if ranks.rank == reader:
            mine = data
    return mine


def _parts(batches: Sequence[BlockInputs], steps: int) -> Iterator[tuple[int, slice]]:
    """For every step the number of a batch and some of its sequences, from all over the data."""
    parts = []
    for number, batch in enumerate(batches):
        count, length, _ = batch.shape
        together = max(1, TOKENS_PER_STEP // length)
        parts += [(number, slice(at, at + together)) for at in range(0, count, together)]
    stride = max(1, len(parts) // steps)
    for step in range(steps):
        yield parts[step * stride % len(parts)]


def _root_mean_square(weight: Tensor) -> float:
    """Of the entries that are not zero; of which there is one at least."""
    return float((weight.square().sum() / weight.count_nonzero()).sqrt())
