"""Peak memory of a pruning run on the device and on the host, as a list of terms.

It is counted from shapes alone, so the weights of the model need not be present. A walk holds one
block, what is computed for that block, and a batch. The peak is that of the part of the work
(collecting statistics, solving or tuning) that holds most.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place, memory_for
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
from thanos_deploy.pruning.layers import linear_shapes, short_names
from thanos_deploy.pruning.quantise import WALK
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH, Layout
from thanos_deploy.shrink import depth
from thanos_deploy.shrink.options import Fit
from thanos_deploy.solver.masked import entries_together

# Name of the term for the memory that a process holds before it prunes.
BEFORE = "this process before pruning begins"

_FLOAT, _DOUBLE = 4, 8

# Memory that is alive while a layer is solved, in float64 matrices [cols, cols]: the factor of the
# Hessian, and half a matrix for products while the factor is computed, or for the Hessian's copy in
# the last fit.
_SOLVING = 1.5

# Numbers for each weight of a layer while it is solved: the original weight, the current one, the
# result, and the score.
_BESIDE = 4

# Numbers for each weight of the rows that conjugate gradients solve together: the iterate, the
# residual, the direction and its image, the mask, the fixed part, a product, the result.
_GRADIENTS = 8

# Float32 numbers for each weight of a block while it is tuned: the value, the gradient, Adam's two
# moments, and one for smaller data (a mask, or a code and a zero point). Where the block runs in
# float32, also the value before tuning.
_TUNING, _TUNING_FLOAT32 = 5, 6

# Float32 matrices [cols, cols] alive while a layer is quantised: the Hessian and the cross-Gram
# matrix in the order of the columns, and their difference. Float32 numbers for each weight: its
# codes, scales and zero points in both orders, and what a move of the descent changes.
_ORDERED, _CODES = 3, 8

# Float64 matrices [cols, cols] alive while inputs are eliminated from a layer: the Hessian,
# that of the dense model's input, the factor, the inverse, the inverse of a trial, a product.
_ELIMINATING = 6

# Names of terms that an option of the user can make smaller.
TUNED = "tuning: weights, masks, gradients, moments"
DENSE = "the dense block"
WAITING = "calibration data between blocks"

# Float32 vectors of the hidden size that norms and the loss keep for each token of a tuning step.
_NORMS = 6

# Workspaces of cuBLAS and cuSOLVER.
LIBRARIES = 192 << 20


@dataclass(frozen=True, slots=True)
class Term:
    """One part of the memory.

    Attributes:
        name: what is held, for messages.
        bytes: size in bytes.
    """

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory, as lists of terms.

    Attributes:
        device: terms in the memory of the GPU; empty if the CPU computes.
        host: terms in the host memory of the process.
    """

    device: tuple[Term, ...]
    host: tuple[Term, ...]

    def beside(self, resident: int) -> "Memory":
        """Add the resident memory, in bytes, that the process holds already."""
        return Memory(self.device, (Term(BEFORE, resident), *self.host))

    @property
    def device_bytes(self) -> int:
        """Sum of the device's terms."""
        return total(self.device)

    @property
    def host_bytes(self) -> int:
        """Sum of the host's terms."""
        return total(self.host)


def total(terms: Iterable[Term]) -> int:
    """Sum of some terms in bytes."""
    return sum(term.bytes for term in terms)


def largest(*each: Memory) -> Memory:
    """The peak of several pieces of work, one after another: that of the largest piece."""
    return max(each, key=lambda one: (one.device_bytes, one.host_bytes))


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
    solving: Sequence[Term] = (),
) -> Memory:
    """Peak memory of a walk that prunes weights to zero in place.

    Args:
        checkpoint: the model; the tensors of its weights are not read.
        segments: int64[count, length], calibration tokens; only the shape counts.
        linears: names of the layers that are pruned, relative to the block.
        walk: options of the walk.
        further: number of segments that are used for tuning only.
        forward: dtype in which blocks run.
        dtype: dtype of the stored weights; None to keep the dtype of each tensor.
        device: device that computes.
        place: where the calibration data is kept between two blocks.
        tries: layers are pruned for a trial and then restored; see `pruning.sensitivity`.
        solving: what a solver holds in addition to those of pruning.
    """
    ways = 1 + walk.with_dense  # the data passes the pruned model, and perhaps the dense one too
    shapes = linear_shapes(checkpoint)
    block = max(  # the largest block that has layers to prune
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
    if background.host_is_idle(device):
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
    # Inputs of layers are kept for both models until both have passed; outputs only for a moment.
    passing = batch * (ways * sum(widths) + sum(shapes[name][0] for name in block.full_names))
    layer = max(math.prod(shapes[name]) for name in pruned)
    beside = _BESIDE * layer + _GRADIENTS * _together(layer, device)
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
            *solving,
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
    """Peak memory of a recipe, including the walk that tries layers first, if there is one.

    Args:
        recipe: how the model is pruned.
        checkpoint, segments, linears, further, dtype, device, place: see `of_pruning`.
    """
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
    tries = [of_walk(Walk(), tries=True)] if recipe.tries_layers else []
    return largest(of_walk(recipe.walk, further=further), *tries)


def of_quantising(
    checkpoint: Checkpoint,
    segments: Tensor,
    tuning: Tuning,
    *,
    further: int = 0,
    forward: torch.dtype,
    device: torch.device,
    place: Place,
) -> Memory:
    """Peak memory of quantising all linear layers of the blocks; see `quantise.quantise_model`.

    Args:
        tuning: tuning steps of each block after its layers are quantised.
        checkpoint, segments, further, forward, device, place: see `of_pruning`.
    """
    shapes = linear_shapes(checkpoint).values()
    widest, layer = max(cols for _, cols in shapes), max(map(math.prod, shapes))
    return of_pruning(
        checkpoint,
        segments,
        short_names(checkpoint, checkpoint.linears),
        replace(WALK, tune_steps=tuning.tune_steps),
        further=further,
        forward=forward,
        dtype=None,
        device=device,
        place=place,
        solving=(
            Term("statistics in another order of the inputs", _ORDERED * _FLOAT * widest**2),
            Term("codes and scales of the layer", _CODES * _FLOAT * layer),
        ),
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
    """Peak memory of cutting out heads, channels or experts, in float32.

    Args:
        fit: how the remaining weights are refitted.
        tuning: tuning steps of each block after it is cut.
        checkpoint, segments, further, device, place: see `of_pruning`.
    """
    aims = 1 + (fit.dense_target > 0.0)
    ways = 2 if tuning.tune_steps else aims
    shapes = linear_shapes(checkpoint)
    block = max(  # the largest one; without experts, all blocks are alike
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
    if background.host_is_idle(device):
        held.append(Term("the next block, read ahead", _FLOAT * weights))
    batch = max(TOKENS_PER_BATCH, segments.shape[1])
    read = sum(shapes[block.prefix + group[0]][1] for group in block.groups)
    made = sum(shapes[name][0] for name in block.full_names)
    passing = batch * (aims * read + made)
    statistics = Term("statistics of inputs", aims * most)
    layer = max(math.prod(shapes[name]) for name in block.full_names)
    parts = [
        [statistics, Term("activations of one batch", _FLOAT * passing)],
        [
            statistics,
            Term("matrices for removing inputs", _ELIMINATING * _DOUBLE * widest**2),
            Term("weights of the layer that is fitted", _BESIDE * _DOUBLE * layer),
        ],
    ]
    if tuning.tune_steps:
        parts.append(_tuning(checkpoint, segments, weights, read + made, torch.float32))
    held += max(parts, key=total)
    return _memory(checkpoint, segments, further, held, ways, torch.float32, device, place)


def of_trials(checkpoint: Checkpoint, device: torch.device) -> Memory:
    """Peak memory of trying the model without each of its blocks; see `depth.survey`."""
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
    """Memory of tuning a block, in addition to the block itself.

    Args:
        checkpoint, segments, forward: see `of_pruning`.
        weights: number of weights of the block.
        made: for one token, the number of all inputs and outputs of the block's layers.
    """
    step = max(TOKENS_PER_STEP, segments.shape[1])
    numbers = _TUNING_FLOAT32 if forward is torch.float32 else _TUNING
    # Bytes for each token, for norms and the loss.
    stream = _FLOAT * _NORMS * int(checkpoint.config.hidden_size)
    return [
        Term(TUNED, numbers * _FLOAT * weights),
        Term("gradients in the dtype of the block", forward.itemsize * weights),
        Term("activations kept for the backward pass", step * (forward.itemsize * made + stream)),
        Term("gradients of one part of a step", _FLOAT * weights),
    ]


def _together(entries: int, device: torch.device) -> int:
    """Weights of a layer that conjugate gradients solve together; too few on a CPU to count."""
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
    """Split the terms between device and host, and add those of the data between two blocks.

    Args:
        held: terms of the device; if the CPU computes, they are in host memory too.
        ways: 2 if the data passes the dense model as well, otherwise 1.
        checkpoint, segments, further, forward, device, place: see `of_pruning`.
    """
    config = checkpoint.config
    embedding = Term(
        "the embedding, before the first block",
        (forward.itemsize if device.type != "cpu" else _FLOAT)
        * int(config.vocab_size)
        * int(config.hidden_size),
    )
    tokens = (len(segments) + further) * segments.shape[1]
    between = 2 * activation_bytes(checkpoint, tokens, forward, with_dense=ways > 1) // 3
    kept_on = memory_for(place, device, between)
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
