"""What pruning a model holds at once in the memory of the device and of the host, term by term.

Counted from shapes alone, so it can be known of a model that is not here. A walk holds one block,
what is computed of it, and a batch; which part of the work holds most decides.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place, holder
from thanos_deploy.calibration.order import hessian_bytes, turns
from thanos_deploy.calibration.sizes import (
    activation_bytes,
    can_wait,
    waiting_bytes,
)
from thanos_deploy.calibration.tune import TOKENS_PER_STEP
from thanos_deploy.machine import background
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.methods import NO_TUNING, Tuning, Walk
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH, Layout
from thanos_deploy.shrink import depth
from thanos_deploy.shrink.options import Fit
from thanos_deploy.solver.masked import entries_together

# Name of the term for the memory that a process holds before it prunes.
BEFORE = "this process before pruning begins"

_FLOAT, _DOUBLE = 4, 8

# Matrices [cols, cols] of float64, or as much memory, that are alive while a layer is solved: the
# factor, and half of one for products while it is made, or for the last fit's copy of the Hessian.
_SOLVING = 1.5

# Numbers beside each weight of a layer while it is solved: what it was, is and will be, its scores.
_BESIDE = 4

# Numbers beside each weight of those rows that conjugate gradients solve together: where they are,
# the residual, the direction and its image, what is kept and fixed, a product, the result.
_GRADIENTS = 8

# Float32 numbers for each weight of a block while it is tuned: its value, its gradient, what Adam
# keeps, and of fewer bits a mask, or code and zero point. Where the block runs in float32 itself,
# also the value that it began with.
_TUNING, _TUNING_FLOAT32 = 5, 6

# Matrices [cols, cols] of float64 that are alive while inputs are eliminated from a layer: Hessian,
# that of the dense model's input, factor, inverse, the inverse of a trial, a product.
_ELIMINATING = 6

# Terms that an option makes smaller.
TUNED = "tuning: weights, masks, gradients, moments"
DENSE = "the dense block"
WAITING = "calibration data between blocks"

# Float32 vectors as wide as the hidden states that are kept for each token while it is tuned on.
_NORMS = 6

# What cuBLAS and cuSOLVER take for themselves.
LIBRARIES = 192 << 20


@dataclass(frozen=True, slots=True)
class Term:
    """Something that is held in memory.

    Attributes:
        name: what it is.
        bytes: its size.
    """

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What is held at once when most is held.

    Attributes:
        device: in the memory of a GPU; on a CPU nothing.
        host: in the memory of the process.
    """

    device: tuple[Term, ...]
    host: tuple[Term, ...]

    def beside(self, resident: int) -> "Memory":
        """With what the process holds already."""
        return Memory(self.device, (Term(BEFORE, resident), *self.host))

    @property
    def device_bytes(self) -> int:
        """All of the device's."""
        return total(self.device)

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return total(self.host)


def total(terms: Iterable[Term]) -> int:
    """Their sum in bytes."""
    return sum(term.bytes for term in terms)


def of_pruning(
    checkpoint: Checkpoint,
    segments: Tensor,
    linears: Sequence[str],
    walk: Walk,
    *,
    further: int = 0,
    forward: torch.dtype,
    dtype: torch.dtype | None,
    device: torch.device,
    place: Place,
    tries: bool = False,
) -> Memory:
    """What setting weights to zero holds.

    Args:
        checkpoint: the model; its configuration is enough.
        segments: int64[count, length], calibration tokens; only their number counts.
        linears: names of the layers that are pruned, seen from the block.
        walk: how the model is walked.
        further: segments that blocks are only tuned on.
        forward: the dtype in which blocks run.
        dtype: what is stored; None for each tensor's own.
        device: where it is done.
        place: where the calibration data is between two blocks.
        tries: the layers are only tried, and stay as they were; see `pruning.sensitivity`.
    """
    ways = 1 + walk.with_dense  # the pruned model's way, and the dense one's
    shapes = linear_shapes(checkpoint)
    block = max(  # the largest of those that are pruned
        (block for block in checkpoint.blocks if not set(block.linears).isdisjoint(linears)),
        key=lambda block: sum(math.prod(shapes[name]) for name in block.full_names),
    )
    pruned = [block.prefix + name for name in block.linears if name in linears]
    weights = sum(math.prod(shapes[name]) for name in block.full_names)
    widths = [
        shapes[block.prefix + group[0]][1]
        for group in block.groups
        if not set(group).isdisjoint(linears)
    ]
    stored = checkpoint.weights.dtypes[checkpoint.stored_name(f"{pruned[0]}.weight")]
    own = (
        forward
        if forward is torch.float32
        else (stored if dtype in (None, stored) else torch.float32)
    )
    held = [Term("the block", own.itemsize * weights)]
    if own is not forward:
        held.append(
            Term("a copy of the block in the dtype that it runs in", forward.itemsize * weights)
        )
    if walk.with_dense:
        held.append(Term(DENSE, forward.itemsize * weights))
    if tries:
        held.append(Term("layers before and after a trial", 2 * own.itemsize * weights))
    if background.has_time(device):
        held.append(Term("the next block, read ahead", own.itemsize * weights))
    if walk.true_sequential and can_wait(checkpoint, segments, ways, forward):
        waiting = waiting_bytes(checkpoint, segments, ways, forward)
        held.append(Term("activations inside the block", waiting))

    inputs = {name: shapes[block.prefix + name][1] for name in block.linears if name in linears}
    most = max(
        hessian_bytes(turn, inputs)
        for turn in turns(block, inputs, true_sequential=walk.true_sequential)
    )
    statistics = Term("statistics of inputs", ways * most)
    shards = Layout.of(*segments.shape).shards
    batch = max(TOKENS_PER_BATCH, segments.shape[1])
    # What layers read is kept until every way has passed, what they make for a moment.
    passing = batch * (ways * sum(widths) + sum(shapes[name][0] for name in block.full_names))
    largest = max(math.prod(shapes[name]) for name in pruned)
    beside = _BESIDE * largest + _GRADIENTS * _together(largest, device)
    parts = [
        [
            statistics,
            Term("statistics of one shard", statistics.bytes if shards > 1 else 0),
            Term("activations of one batch", forward.itemsize * passing),
        ],
        [
            statistics,
            Term("the factored Hessian", int(_SOLVING * max(widths) ** 2 * _DOUBLE)),
            Term("weights of the layer that is solved", _FLOAT * beside),
        ],
    ]
    if walk.tune_steps:
        made = sum(widths) + sum(shapes[name][0] for name in block.full_names)
        parts.append(_tuning(checkpoint, segments, weights, made, forward))
    held += max(parts, key=total)
    return _memory(checkpoint, segments, further, held, ways, forward, device, place)


def of_recipe(
    checkpoint: Checkpoint,
    segments: Tensor,
    linears: Sequence[str],
    recipe: Recipe,
    *,
    further: int = 0,
    dtype: torch.dtype | None,
    device: torch.device,
    place: Place,
) -> Memory:
    """What a recipe holds, with the walk before it, if there is one; see `of_pruning`."""
    of_walk = partial(
        of_pruning,
        checkpoint,
        segments,
        linears,
        forward=DTYPES[recipe.forward_on(device)],
        dtype=dtype,
        device=device,
        place=place,
    )
    held = of_walk(recipe.walk, further=further)
    if not recipe.tries_layers:
        return held
    return max(
        held, of_walk(Walk(), tries=True), key=lambda one: (one.device_bytes, one.host_bytes)
    )


def of_cutting(
    checkpoint: Checkpoint,
    segments: Tensor,
    fit: Fit,
    tuning: Tuning = NO_TUNING,
    *,
    further: int = 0,
    device: torch.device,
    place: Place,
) -> Memory:
    """What cutting heads and channels out holds, in float32; for the arguments see `of_pruning`."""
    aims = 1 + (fit.dense_target > 0.0)
    ways = 2 if tuning.tune_steps else aims
    shapes = linear_shapes(checkpoint)
    block = max(  # without experts, they are all alike
        checkpoint.blocks,
        key=lambda block: sum(math.prod(shapes[name]) for name in block.full_names),
    )
    weights = sum(math.prod(shapes[name]) for name in block.full_names)
    widest = max(shapes[name][1] for name in block.full_names)
    most = _FLOAT * widest**2
    if block.routed:
        inputs = {name: shapes[block.prefix + name][1] for name in block.routed}
        most = max(
            hessian_bytes(turn, inputs) for turn in turns(block, inputs, true_sequential=True)
        )
    held = [Term("the block", _FLOAT * weights)]
    if ways > 1:
        held.append(Term(DENSE, _FLOAT * weights))
    if background.has_time(device):
        held.append(Term("the next block, read ahead", _FLOAT * weights))
    batch = max(TOKENS_PER_BATCH, segments.shape[1])
    read = sum(shapes[block.prefix + group[0]][1] for group in block.groups)
    made = sum(shapes[name][0] for name in block.full_names)
    passing = batch * (aims * read + made)
    statistics = Term("statistics of inputs", aims * most)
    largest = max(math.prod(shapes[name]) for name in block.full_names)
    parts = [
        [statistics, Term("activations of one batch", _FLOAT * passing)],
        [
            statistics,
            Term("matrices for removing inputs", _ELIMINATING * _DOUBLE * widest**2),
            Term("weights of the layer that is fitted", _BESIDE * _DOUBLE * largest),
        ],
    ]
    if tuning.tune_steps:
        parts.append(_tuning(checkpoint, segments, weights, read + made, torch.float32))
    held += max(parts, key=total)
    return _memory(checkpoint, segments, further, held, ways, torch.float32, device, place)


def of_trials(checkpoint: Checkpoint, device: torch.device) -> Memory:
    """What trying the model without each of its blocks holds; see `depth.survey`."""
    shapes, config = linear_shapes(checkpoint), checkpoint.config
    size = (torch.bfloat16 if multiplies_bfloat16(device) else torch.float32).itemsize
    weights = max(
        sum(math.prod(shapes[name]) for name in block.full_names) for block in checkpoint.blocks
    )
    states = depth.TOKENS * int(config.hidden_size)
    held = (
        Term("the block", size * weights),
        Term(
            "activations before and after a block, for each trial",
            size * 2 * (len(checkpoint.blocks) + 1) * states,
        ),
    )
    embedding = Term(
        "the embedding, before the first block",
        size * int(config.vocab_size) * int(config.hidden_size),
    )
    if device.type == "cpu":
        return Memory((), max(held, (embedding,), key=total))
    return Memory((*held, Term("workspaces of CUDA's libraries", LIBRARIES)), (embedding,))


def _tuning(
    checkpoint: Checkpoint, segments: Tensor, weights: int, made: int, forward: torch.dtype
) -> list[Term]:
    """What tuning a block holds beside it.

    Args:
        checkpoint, segments, forward: see `of_pruning`.
        weights: of the block.
        made: numbers that its layers read and make of a token.
    """
    step = max(TOKENS_PER_STEP, segments.shape[1])
    numbers = _TUNING_FLOAT32 if forward is torch.float32 else _TUNING
    # Float32 numbers of norms and of the loss.
    stream = _FLOAT * _NORMS * int(checkpoint.config.hidden_size)
    return [
        Term(TUNED, numbers * _FLOAT * weights),
        Term("gradients in the dtype of the block", forward.itemsize * weights),
        Term("activations kept for the backward pass", step * (forward.itemsize * made + stream)),
        Term("gradients of one part of a step", _FLOAT * weights),
    ]


def _together(entries: int, device: torch.device) -> int:
    """Weights of a layer that conjugate gradients solve together; few on a CPU."""
    return min(entries, entries_together(device)) if device.type != "cpu" else 0


def _memory(
    checkpoint: Checkpoint,
    segments: Tensor,
    further: int,
    held: Sequence[Term],
    ways: int,
    forward: torch.dtype,
    device: torch.device,
    place: Place,
) -> Memory:
    """On a CPU the host holds what else the device does."""
    config = checkpoint.config
    embedding = Term(
        "the embedding, before the first block",
        (forward.itemsize if device.type != "cpu" else _FLOAT)
        * int(config.vocab_size)
        * int(config.hidden_size),
    )
    tokens = (len(segments) + further) * segments.shape[1]
    between = 2 * activation_bytes(checkpoint, tokens, forward, with_dense=ways > 1) // 3
    kept_on = holder(place, device, between)
    waits = [Term(WAITING, between)] if kept_on is not None else []
    if device.type == "cpu":
        return Memory((), tuple(waits) + max((tuple(held), (embedding,)), key=total))
    written = Term("the finished block, while it is written to disk", held[0].bytes)
    moved = max(TOKENS_PER_BATCH, segments.shape[1]) * int(config.hidden_size) * forward.itemsize
    batches = Term("batches that are read from and written to disk", 4 * ways * moved)
    host = max([embedding], [written, batches], key=total)
    libraries = Term("workspaces of CUDA's libraries", LIBRARIES)
    there = kept_on is not None and kept_on.type == device.type
    return Memory((*held, *(waits if there else []), libraries), (*host, *([] if there else waits)))
