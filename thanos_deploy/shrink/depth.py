"""Choose whole blocks to drop, by how much each changes the model's last hidden states.

Each block is left out in turn, and some tokens pass the other blocks. The change is the mean of
|z - t|^2 / |t|^2 over the tokens, with t the output of the dense model's last block and z the last
output without that block. The block with the smallest change is dropped. Then the search is
repeated with the blocks that are left, until enough parameters are gone.

A model without one block equals the whole model up to that block. So one walk tries all of them:
the hidden states of a trial branch off at its block, and each block is read once. For each dropped
block this costs half as many passes through the model as there are blocks, with few tokens.

Greedy removal by the change of the whole model is the search of "SLEB" (Song and others, 2024,
arXiv 2402.09025), which compares the predictions of both models. "ShortGPT" (Men and others, 2024,
arXiv 2403.03853) compares only the input and output of each block, which takes one pass;
benchmarks/LOG.md compares the two.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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

# Tokens of a trial, and tokens per sequence: many contexts rather than long ones. All of them pass
# a block at once.
TOKENS, LENGTH = 2048, 256


@dataclass(frozen=True, slots=True)
class Removal:
    """One block that is removed.

    Attributes:
        block: its number in the dense model.
        change: relative change of the last hidden states, without this block and without the blocks
            that were removed before it.
        seconds: time of the search for it, by activity.
    """

    block: int
    change: float
    seconds: Mapping[str, float]


def check(checkpoint: Checkpoint, fraction: float) -> None:
    """Refuse a fraction that would leave no block, before anything is computed.

    Raises:
        UsageError: no block would be left.
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
    """Return the number of parameters of each block, from the shapes in the checkpoint."""
    return [
        sum(checkpoint.entries_of_block(index).values()) for index in range(len(checkpoint.blocks))
    ]


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
    """Choose the blocks to remove.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens; only the first `TOKENS` or so are used.
        fraction: smallest fraction of the parameters of all blocks to remove.
        device: where each block is while tokens pass it.
        journal: where to keep every choice; the search continues after the choices that it has.
        on_progress: called after every choice.

    Returns:
        the removed blocks, in the order in which they were chosen.

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
    with ExitStack() as stack:
        if journal is not None:
            stack.callback(journal.close)
        if missing <= 0:
            return found
        trials = _Trials(checkpoint, segments, device)
        while missing > 0:
            clock = Clock(device=device)
            with clock.measure("collect"):
                left = [n for n in range(len(sizes)) if n not in {one.block for one in found}]
                changes = trials.without_each(left)
            # If two changes are equal, all ranks choose the first block.
            block = min(changes, key=lambda number: (changes[number], number))
            found.append(Removal(block, changes[block], clock.seconds))
            if journal is not None:
                journal.add(found[-1], {}, ())
                journal.finish()
            missing -= sizes[block]
            on_progress(len(found), max(expected, len(found)))
    return found


def plan(checkpoint: Checkpoint, removals: Sequence[Removal]) -> Plan:
    """Return the plan of a model without some blocks.

    The predicted loss of a removed block is the increase of the change that its removal caused.

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
    """One rank's message: maps the number of a block to the change if it is left out."""

    of_blocks: Mapping[int, float]


class _Trials:
    """Runs some tokens through a model with one or another of its blocks left out."""

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
        """Return the change if each block alone is left out; the trials are divided over ranks.

        Args:
            left: numbers of the blocks that the model still has, rising.

        Returns:
            number of the block -> change.
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
        """Return the last hidden states with all blocks of `left`, and without each of `tried`.

        Returns:
            number of the block that was left out, or None -> [sequences, tokens, width].
        """
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
