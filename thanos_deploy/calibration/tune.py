"""Tune a pruned block as a whole: a few steps of all its kept weights, towards the dense block.

Layers are pruned one at a time, each with the best update that one layer can have. What that leaves
is what layers can do for each other: here all of them move together, so that what leaves the block
comes nearer to what leaves it in the dense model. Zeros stay zero.

Every token counts by its error relative to its size, |z - t|^2 / |t|^2 with t what leaves the dense
block, because the norm that follows divides by it. Adam takes each step on another part of the
calibration data; its rate falls linearly to 0 and is a fraction of the root mean square of each
layer's kept weights, so that it fits models of any scale.

The sequences of a step are cut into parts, the same for every number of ranks. A rank that has none
of them gets its part from the rank that has; their gradients are added up in one order, and every
rank takes the step for some of the weights.

Source of the idea: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv
2402.12419.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from thanos_deploy.calibration.blocks import BlockInputs
from thanos_deploy.calibration.collect import Walk, advance
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.spread import even
from thanos_deploy.ranks.sums import OrderedSum, run_of, whole_of

# Tokens that a step looks at; a segment at least.
TOKENS_PER_STEP = 1024

# Parts of a step, if it looks at so many sequences.
_PARTS = 4

# Chosen on held-out C4 documents with SmolLM2-135M at 2:4; see benchmarks/LOG.md.
_RATE = 1e-2
_BETAS = (0.9, 0.95)


def tune(visit: Visit, linears: Collection[str], steps: int) -> None:
    """Tune linear layers of a block, in place, when all of them have been pruned.

    Args:
        visit: the block; its dense copy is run to the end.
        linears: names of the layers, seen from the block.
        steps: how many steps.

    Raises:
        ModelError: a value does not fit the dtype in which it is stored.
    """
    walk, dense = visit.walk, visit.dense
    assert dense is not None
    linears = [name for name in linears if matrix(visit.block.get_submodule(name)).count_nonzero()]
    if not linears:
        return
    advance(dense)
    for batch in walk.batches:
        batch.paused = None  # what waits in the block has passed layers that change now
    own = [visit.block.get_submodule(name).get_parameter("weight") for name in linears]
    ranks = current()
    weights = [weight.float() for weight in own]  # in which steps add up
    shares = [run_of(ranks, weight) for weight in weights]
    running = [walk.block.get_submodule(name).get_parameter("weight") for name in linears]
    kept = [(share != 0).to(share.dtype) for share in shares]
    optimizer = torch.optim.Adam(
        [
            {"params": [share], "lr": _RATE * _root_mean_square(weight)}
            for share, weight in zip(shares, weights, strict=True)
        ],
        betas=_BETAS,
        eps=1e-12,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    walk.block.requires_grad_(False)
    for run in running:
        run.requires_grad_(True)
    for number, rows in _parts(walk.batches, steps):
        gradients = _gradients(visit, dense, number, rows, running)
        for share, gradient in zip(shares, gradients, strict=True):
            share.grad = gradient
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for share, run, keep in zip(shares, running, kept, strict=True):
            share.mul_(keep)
            if ranks.size > 1 or not _share_memory(share, run):
                run.copy_(whole_of(ranks, share.to(run.dtype), run.shape))
    for name, stored, share, run in zip(linears, own, shares, running, strict=True):
        run.requires_grad_(False)
        stored.copy_(whole_of(ranks, share, stored.shape))
        visit.write(name, matrix(visit.block.get_submodule(name)))


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
            target = target.float()
            with torch.enable_grad():
                left = batch.forward_of(
                    hidden, visit.index, visit.walk.block, parts[own], visit.tuned_in
                )
                error = (left.float() - target).square().sum(dim=-1)
                relative = error / target.square().sum(dim=-1).clamp(min=1e-30)
                loss = relative.sum() / ((stop - first) * batch.shape[1])
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


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """What is written to one is in the other, as for a rank by itself that runs in float32."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _root_mean_square(weight: Tensor) -> float:
    """Of the entries that are not zero; of which there is one at least."""
    return float((weight.square().sum() / weight.count_nonzero()).sqrt())
