"""Drop whole blocks: which ones, by what the model's last hidden states lose with each.

Each block in turn is left out, and the tokens pass the rest. What this changes is the mean of
|z - t|^2 / |t|^2 over the tokens, with t what leaves the last block of the dense model and z what
leaves the last one now. The block that changes least is dropped; then each of the others is left
out as well, and so on, until enough parameters are gone.

A model without one block is the same before that block. So one walk tries all of them: the data of
every trial goes along from its block on, and each block is read once. For each block that is
dropped this takes half as many passes through the model as there are blocks, with few tokens.

Choosing one block after the other by what the whole model loses is the search of "SLEB" (Song and
others, 2024, arXiv 2402.09025), which compares what both models predict. "ShortGPT" (Men and
others, 2024, arXiv 2403.03853) looks only at what a block changes of what enters it, which takes
one pass; benchmarks/LOG.md compares the two.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy.calibration.blocks import block_inputs
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.parameters import ParameterFiles
from thanos_deploy.calibration.visit import Clock
from thanos_deploy.errors import UsageError
from thanos_deploy.machine import environment
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.model.block import DROPPED, BlockPlan
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.depth import describe
from thanos_deploy.model.structure import blocks_of
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.ranks.group import current
from thanos_deploy.shrink.sizing import Plan

# Tokens that every block is tried with, in pieces of this length: many contexts rather than long
# ones. All of them pass a block at once.
TOKENS, LENGTH = 2048, 256


@dataclass(frozen=True, slots=True)
class Removal:
    """One block that goes.

    Attributes:
        block: its number in the dense model.
        change: of the last hidden states relative to their size, with the blocks before it in the
            list gone as well.
        seconds: time that it took to find it, by activity.
    """

    block: int
    change: float
    seconds: Mapping[str, float]


def check(checkpoint: Checkpoint, fraction: float) -> None:
    """Refuse a fraction for which no block would be left, before anything is computed.

    Raises:
        UsageError: it is such.
    """
    sizes = block_parameters(checkpoint)
    most = 1.0 - min(sizes) / sum(sizes)
    if fraction > most:
        raise UsageError(
            f"{checkpoint.folder}: no block would be left with {fraction:.1%} of the parameters of "
            f"its {len(sizes)} blocks removed",
            fix=f"remove at most structured:{math.floor(1000 * most) / 1000:g}",
        )


def block_parameters(checkpoint: Checkpoint) -> list[int]:
    """Parameters of each block, from the headers of its weights."""
    sizes = [0] * len(checkpoint.blocks)
    numbers = {block.prefix: number for number, block in enumerate(checkpoint.blocks)}
    for name, stored in checkpoint.weights.stored.items():
        if name.startswith(f"{checkpoint.family.blocks}."):
            depth = checkpoint.family.blocks.count(".") + 2
            prefix = ".".join(name.split(".")[:depth]) + "."
            sizes[numbers[prefix]] += math.prod(checkpoint.weights.shapes[stored])
    return sizes


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    fraction: float,
    *,
    device: torch.device = CPU,
    journal: Journal[Removal] | None = None,
    on_progress: OnProgress = silent,
) -> list[Removal]:
    """Which blocks go, in the order in which they were chosen.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens, of which the first few are looked at.
        fraction: of the parameters of all blocks, what has to go at least.
        device: where each block is while tokens pass it.
        journal: where to keep every block that was chosen; those that it has are not chosen again.
        on_progress: told of every block that was chosen.

    Raises:
        UsageError: see `check`.
        ModelError: weights are missing or have NaN.
    """
    check(checkpoint, fraction)
    found = [] if journal is None else list(journal.reports)
    sizes = block_parameters(checkpoint)
    missing = math.ceil(fraction * sum(sizes) - 1e-6) - sum(sizes[one.block] for one in found)
    expected = len(found) + math.ceil(missing / max(sizes))
    on_progress(len(found), expected)
    if missing <= 0:
        return found
    trials = _Trials(checkpoint, segments, device)
    while missing > 0:
        clock = Clock(device=device)
        with clock.measure("collect"):
            left = [n for n in range(len(sizes)) if n not in {one.block for one in found}]
            changes = trials.without_each(left)
        # Of equal ones the first, on all ranks.
        block = min(changes, key=lambda number: (changes[number], number))
        found.append(Removal(block, changes[block], clock.seconds))
        if journal is not None:
            journal.add(found[-1], {}, ())
            journal.finish()
        missing -= sizes[block]
        on_progress(len(found), max(expected, len(found)))
    if journal is not None:
        journal.close()
    return found


def plan(checkpoint: Checkpoint, removals: Sequence[Removal]) -> Plan:
    """The plan of a model without some blocks; what each of them adds to the change is its loss.

    Raises:
        UsageError: no config.json describes such a model; see `depth.describe`.
    """
    kept = [
        number
        for number in range(len(checkpoint.blocks))
        if number not in {one.block for one in removals}
    ]
    describe(checkpoint, kept)
    losses, before = dict.fromkeys(kept, 0.0), 0.0
    for one in removals:
        losses[one.block], before = one.change - before, one.change
    return Plan(
        tuple(
            BlockPlan(
                width,
                width if number in kept else DROPPED,
                size,
                size if number in kept else 0,
                losses[number],
            )
            for number, (width, size) in enumerate(
                zip(checkpoint.widths, block_parameters(checkpoint), strict=True)
            )
        ),
        stock=True,
    )


@dataclass(frozen=True, slots=True)
class _Changes:
    """What a rank says: by the number of a block, what changes if it is left out."""

    of_blocks: Mapping[int, float]


class _Trials:
    """Some tokens on their way through a model without one or another of its blocks."""

    def __init__(self, checkpoint: Checkpoint, segments: Tensor, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        self._dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        self._model = checkpoint.skeleton()
        self._files = ParameterFiles(checkpoint, None)
        family = checkpoint.family
        base = self._model.base_model
        self._files.load(base, f"{family.base}.", skip=family.blocks, dtype=self._dtype)
        length = min(LENGTH, segments.shape[1])
        ids = segments[: max(1, TOKENS // length), :length]
        (self._data,) = block_inputs(self._model, family, [ids])
        self._entering = self._data.hidden.to(device)
        self._model.get_input_embeddings().to("meta")
        environment.return_freed_memory()
        everything = range(len(checkpoint.blocks))
        self._dense = self._through(everything, ())[None]

    def without_each(self, left: Sequence[int]) -> dict[int, float]:
        """By the number of each block, what changes if it is left out and the others stay.

        Each is tried by the rank that it falls to.

        Args:
            left: rising numbers of the blocks that the model has.
        """
        ranks = current()
        ends = self._through(left, left[ranks.rank :: ranks.size])
        wanted = self._dense.float()
        size = wanted.square().sum(dim=-1).clamp(min=1e-30)
        own = {
            number: float(((end.float() - wanted).square().sum(dim=-1) / size).mean())
            for number, end in ends.items()
            if number is not None
        }
        said: dict[int, float] = {}
        for one in ranks.gather(_Changes(own)):
            said |= one.of_blocks
        return {number: said[number] for number in left}

    def _through(self, left: Sequence[int], tried: Sequence[int]) -> dict[int | None, Tensor]:
        """What leaves the last block: with all that are left (None), and without each one tried."""
        blocks = blocks_of(self._model, self._checkpoint.family)
        ways: dict[int | None, Tensor] = {None: self._entering}
        for number in left:
            block, prefix = blocks[number], self._checkpoint.blocks[number].prefix
            with memory_for(f"block {number}"):
                weights = self._files.read(block, prefix, dtype=self._dtype, device=self._device)
                block.load_state_dict(weights, strict=False, assign=True)
                block.to(self._device)
                passed = {
                    way: self._data.forward_of(hidden, number, block, slice(None))
                    for way, hidden in ways.items()
                }
            if number in tried:
                passed[number] = ways[None]
            ways = passed
            block.to("meta")
        return ways
