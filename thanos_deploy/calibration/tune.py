"""Tune a block as a whole: a few gradient steps on all its layers, towards the dense block.

Layers are pruned or quantised one at a time, each with the best update for that layer alone. Here
all layers change together, so that they can compensate for each other and the output of the block
comes nearer to that of the dense block. A `Learner` decides what the steps change in a layer; the
one in this module, `Kept`, changes the weights that pruning has kept, and zeros stay zero.

The loss of a token is its relative error |z - t|^2 / |t|^2, with z the output of the block and t
that of the dense block, because the next norm divides by the size of t. Adam takes each step on
another part of the calibration data, with a learning rate that falls linearly to 0. If the error of
a block is not lower afterwards, the block is restored.

The sequences of a step are cut into parts, in the same way for every number of ranks. The rank that
has the batch sends the other ranks their parts. The gradients of the parts are summed in one fixed
order, and every rank updates some of the weights.

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
from thanos_deploy.ranks.schedule import even
from thanos_deploy.ranks.sums import OrderedSum, run_of, whole_of

# Tokens of one step; a step uses at least one segment.
TOKENS_PER_STEP = 1024

# Parts into which the sequences of a step are cut; fewer if the step has fewer sequences.
_PARTS = 4

# Learning rate, as a fraction of the root mean square of a layer's kept weights, so that it suits
# models of any scale. Chosen on held-out C4 documents with SmolLM2-135M at 2:4; see
# benchmarks/LOG.md.
_RATE = 1e-2
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Learned:
    """Numbers that Adam changes, in place.

    Attributes:
        values: float32, the numbers.
        rate: learning rate of the first step.
    """

    values: Tensor
    rate: float


class Learner(Protocol):
    """A layer's weight while its block is tuned, as a function of learned numbers."""

    @property
    def learned(self) -> Sequence[Learned]:
        """The numbers that the optimiser changes; the same tensors at every call."""
        ...

    def receive(self, gradient: Tensor) -> None:
        """Set the gradients of the learned numbers; called by all ranks.

        Args:
            gradient: float32, this rank's run of the gradient with respect to the weight as the
                layer stores it; see `run_of`.
        """
        ...

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the layer's current weight, [outputs, inputs]; called by all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """The effect of tuning a block.

    Attributes:
        before, after: mean of |z - t|^2 / |t|^2 over the tokens on which the error is measured,
            before and after the steps. If it is not lower afterwards, the block was restored.
    """

    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether the steps lowered the error; False if it is NaN."""
        return self.after < self.before


def tune(visit: Visit, linears: Collection[str], steps: int) -> Tuned | None:
    """Tune the kept weights of a block, in place, after all of its layers have been pruned.

    Args:
        visit: the block; the data of the dense model is run to the end of its copy of the block.
        linears: names of the layers, relative to the block.
        steps: number of steps.

    Returns:
        the errors before and after; None if every weight is zero.

    Raises:
        ModelError: a value does not fit the dtype in which it is stored.
    """
    there = {name: visit.block.get_submodule(name) for name in linears}
    learners = {name: Kept(one) for name, one in there.items() if matrix(one).count_nonzero()}
    return learn(visit, learners, steps) if learners else None


class Kept:
    """The non-zero weights of a layer, as a `Learner`; each rank updates a run of the entries."""

    def __init__(self, linear: nn.Module) -> None:
        """Begin with the weight as it is.

        Args:
            linear: the layer; at least one of its weights is not zero.
        """
        self._linear = linear
        weight = linear.get_parameter("weight").float()
        self._shape = weight.shape
        # A copy, because the layer itself must not change until the steps are done.
        self._run = run_of(current(), weight).clone()
        self._kept = (self._run != 0).to(self._run.dtype)  # PyTorch multiplies by bool slowly
        self.learned = (Learned(self._run, _RATE * _root_mean_square(weight)),)

    def receive(self, gradient: Tensor) -> None:
        """See `Learner`."""
        self._run.grad = gradient

    def weight(self, dtype: torch.dtype) -> Tensor:
        """See `Learner`."""
        run = self._run.mul_(self._kept).to(dtype)
        return turned(self._linear, whole_of(current(), run, self._shape))


def learn(visit: Visit, learners: Mapping[str, Learner], steps: int) -> Tuned:
    """Take steps on some layers of a block together, and write the tuned weights.

    Args:
        visit: the block; the data of the dense model is run to the end of its copy of the block.
        learners: maps the name of each layer, relative to the block, to its learner; at least one.
        steps: number of steps.

    Returns:
        the errors before and after; if the error is not lower, the old weights were written.

    Raises:
        ModelError: a value does not fit the dtype in which it is stored.
    """
    walk, dense = visit.walk, visit.dense
    assert dense is not None
    advance(dense)
    for batch in walk.batches:
        batch.paused = None  # a waiting pass has run layers that change now
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
    # The old weights, to restore. If blocks run in another dtype, a copy of the block runs, and the
    # block itself still has them.
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
    """One rank's message: the mean error of the first sequence of each of its batches."""

    of_batches: tuple[float, ...]


def _error(visit: Visit, dense: Walk) -> float:
    """The mean error over the tokens of every batch's first sequence; the same on all ranks."""
    own: list[float] = []
    for number in visit.walk.own:
        batch, one = visit.walk.batches[number], slice(0, 1)
        left = batch.forward_of(
            batch.hidden[one], visit.index, visit.walk.block, one, visit.tuned_in
        )
        relative = _relative(left, dense.batches[number].left[one])
        own.append(relative.double().mean().item())
    every = [error for said in current().gather(_Errors(tuple(own))) for error in said.of_batches]
    return math.fsum(every) / len(every)  # exact, so the order of the ranks does not matter


def _relative(left: Tensor, target: Tensor) -> Tensor:
    """|z - t|^2 / |t|^2 of every token, [sequences, tokens], with z `left` and t `target`."""
    target = target.float()
    error = (left.float() - target).square().sum(dim=-1)
    return error / target.square().sum(dim=-1).clamp(min=1e-30)


def _gradients(
    visit: Visit, dense: Walk, number: int, rows: slice, running: Sequence[Tensor]
) -> list[Tensor]:
    """Return this rank's run of the gradient of a step's loss, for each weight; float32.

    Args:
        visit: the block.
        dense: the data that has left the dense block.
        number: number of the batch.
        rows: the sequences of the batch that the step uses.
        running: the weights of the block that runs.
    """
    ranks, batch, beside = current(), visit.walk.batches[number], dense.batches[number]
    first, stop, _ = rows.indices(batch.shape[0])
    holder = ranks.owner_of(batch.shard)
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
    """Return the input and the target output of this rank's part in a turn; None without a part.

    The rank that has the batch sends the other ranks their parts.

    Args:
        batch: the batch.
        whole: input and target output of the whole batch; None on ranks that do not have it.
        parts: the sequences of each part.
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
            ranks.send(tensor.contiguous(), holder, reader)
        if ranks.rank == reader:
            mine = data
    return mine


def _parts(batches: Sequence[BlockInputs], steps: int) -> Iterator[tuple[int, slice]]:
    """Yield the batch number and the sequences of every step, spread over all of the data."""
    parts = []
    for number, batch in enumerate(batches):
        count, length, _ = batch.shape
        together = max(1, TOKENS_PER_STEP // length)
        parts += [(number, slice(at, at + together)) for at in range(0, count, together)]
    stride = max(1, len(parts) // steps)
    for step in range(steps):
        yield parts[step * stride % len(parts)]


def _root_mean_square(weight: Tensor) -> float:
    """Root mean square of the non-zero entries, of which there must be at least one."""
    return float((weight.square().sum() / weight.count_nonzero()).sqrt())
