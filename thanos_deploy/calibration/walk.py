"""Walk a checkpoint block by block with calibration data, one block's weights in memory at a time.

A GPU, if there is one, holds that block, what is made of it, and the batch that passes. The file of
weights, the embeddings and the data between two blocks stay with the host.

Each block sees the data as the blocks before it, changed or not, pass it on.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_deploy.calibration.activations import Activations, StoredInputs
from thanos_deploy.calibration.blocks import BlockInputs, Walk, advance, block_inputs
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.errors import ModelError
from thanos_deploy.machine import devices, environment
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.structure import BlockStructure, blocks_of
from thanos_deploy.model.weights import WeightsCopy

# Tokens per forward pass: enough to keep the cores busy, little enough to stay in their caches.
TOKENS_PER_BATCH = 2048

# What forward passes may hold that wait inside a block until a layer is pruned. Where it would be
# more, each starts over from the block's input, which takes longer and holds one batch at a time.
WAITING_BYTES = 768 << 20


@dataclass(slots=True)
class Clock:
    """Seconds by activity.

    Attributes:
        seconds: activity -> seconds.
        device: where the work is done, which is waited for.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device: torch.device = CPU

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time until the end of the `with` statement."""
        started = time.perf_counter()
        yield
        devices.wait(self.device)
        spent = time.perf_counter() - started
        self.seconds[activity] = self.seconds.get(activity, 0.0) + spent


@dataclass(frozen=True, slots=True)
class Visit:
    """One block on the walk, to be changed in place.

    Attributes:
        index: its number.
        structure: its linear layers.
        block: its weights: in float32 where it runs in that; else, as no value of theirs would be
            another one, in the dtype in which they are stored if that is also the one in which they
            will be written.
        walk: the calibration data that enters it, at a copy of the block if that runs in another
            dtype.
        dense: the same data in the dense model, at its own copy of the block; None if that was not
            asked for.
        dtypes: name of each of its parameters -> the dtype in which it will be written.
        can_wait: forward passes may wait inside the block; see `WAITING_BYTES`.
        clock: where its time went; the walk adds "forward" and "journal" when it goes on to the
            next block.
        untouched: names of parameters that are to be written as they are in the checkpoint, to the
            last bit.
    """

    index: int
    structure: BlockStructure
    block: nn.Module
    walk: Walk
    dense: Walk | None
    dtypes: dict[str, torch.dtype]
    can_wait: bool
    clock: Clock
    untouched: set[str] = field(default_factory=set)

    @property
    def prefix(self) -> str:
        """What its parameters' full names begin with."""
        return self.structure.prefix

    def write(self, linear: str, weight: Tensor) -> Tensor:
        """Give a linear layer another matrix of the same shape, here and in the block that runs.

        Returns:
            [outputs, inputs], the values that will be stored; a view of the layer's own.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        own = matrix(self.block.get_submodule(linear))
        own.copy_(self.stored(f"{linear}.weight", weight))
        if self.walk.block is not self.block:
            matrix(self.walk.block.get_submodule(linear)).copy_(own)
        return own

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's new value as it will be written; see `stored`.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        return stored(tensor, self.dtypes[name], self.prefix + name)


@torch.no_grad()
def visits(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    copy: WeightsCopy | None = None,
    with_dense: bool = False,
    forward: torch.dtype = torch.float32,
    journal: Journal[Any] | None = None,
    device: torch.device = CPU,
) -> Iterator[Visit]:
    """Visit every block in order; what is done to it counts for the blocks after it.

    With a journal, only the blocks that have no report there yet; each visit must end with one.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        copy: where to write every block once it has been visited, and at the end all that lies
            outside the blocks, unchanged; None to write nothing.
        with_dense: run the data through the unchanged blocks as well.
        forward: the dtype in which blocks run, float32 or bfloat16.
        journal: where to keep every block once it has been visited.
        device: where blocks are while they are visited.

    Raises:
        ModelError: weights are missing, have NaN, or are not those that config.json describes; or
            hidden states do not fit the dtype of the weights.
        ResourceError: a block does not fit into the GPU's memory.
    """
    family = checkpoint.family
    model = checkpoint.skeleton()
    blocks = blocks_of(model, family)
    files = _Files(checkpoint, copy)
    files.load(model.base_model, f"{family.base}.", skip=family.blocks, dtype=forward)
    first = 0
    if journal is not None:
        first = len(journal.reports)
        for index in range(first):
            files.write(journal.parameters(index))
    with ExitStack() as stack:
        folder = journal.folder if journal else Path(stack.enter_context(TemporaryDirectory()))
        activations, walks = _enter(
            checkpoint,
            model,
            segments,
            folder,
            first,
            with_dense=with_dense,
            forward=forward,
            device=device,
        )
        stack.callback(activations.close)
        model.get_input_embeddings().to("meta")
        environment.return_freed_memory()
        for index in range(first, len(blocks)):
            block, structure = blocks[index], checkpoint.blocks[index]
            with devices.memory_for(f"block {index}"):
                files.load(
                    block,
                    structure.prefix,
                    dtype=torch.float32 if forward is torch.float32 else None,
                    device=device,
                )
                running = block if forward is torch.float32 else _copy(block, forward)
                dense = _copy(block, forward) if with_dense else None
            visit = Visit(
                index=index,
                structure=structure,
                block=block,
                walk=Walk(index, running, walks["pruned"]),
                dense=None if dense is None else Walk(index, dense, walks["dense"]),
                dtypes=files.dtypes(block, structure.prefix),
                can_wait=waiting_bytes(checkpoint, segments, len(walks), forward) <= WAITING_BYTES,
                clock=Clock(device=device),
            )
            yield visit
            with devices.memory_for(f"block {index}"):
                _leave(visit, files, activations if index + 1 < len(blocks) else None, journal)
            environment.return_freed_memory()
    files.copy_rest()


def _enter(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    segments: Tensor,
    folder: Path,
    index: int,
    *,
    with_dense: bool,
    forward: torch.dtype,
    device: torch.device,
) -> tuple[Activations, dict[str, list[BlockInputs]]]:
    """The calibration data before a block, and its batches on their ways through the models.

    What enters a block that is not the first one is in the folder.
    """
    parts = torch.split(segments, max(1, TOKENS_PER_BATCH // segments.shape[1]))
    dtype = _activation_dtype(checkpoint, forward)
    ways = ("pruned", "dense") if with_dense else ("pruned",)
    kinds = {
        f"{way}.{number}": (dtype, (*part.shape, checkpoint.config.hidden_size))
        for way in ways
        for number, part in enumerate(parts)
    }
    activations = Activations(folder, index if index else -1, kinds, forward, device)
    walks: dict[str, list[BlockInputs]] = {way: [] for way in ways}
    for number, part in enumerate(parts):
        (data,) = block_inputs(model, checkpoint.family, [part])
        for way in ways:
            batch = StoredInputs(activations, f"{way}.{number}", data.arguments)
            if index == 0:
                batch.hidden = data.hidden
            walks[way].append(batch)
    if index == 0:
        activations.advance()
    return activations, walks


def _leave(
    visit: Visit,
    files: "_Files",
    activations: Activations | None,
    journal: Journal[Any] | None,
) -> None:
    """Take the data through a block that has been visited, write the block, and let go of it.

    Args:
        visit: the block.
        files: where it goes.
        activations: what is to enter the next block; None if there is none.
        journal: where to keep it as well.
    """
    walks = [path for path in (visit.walk, visit.dense) if path is not None]
    leaving = None
    with visit.clock.measure("forward"):
        if activations is not None:
            for path in walks:
                advance(path)
            leaving = activations.advance()
    finished = files.finished(visit.block, visit.prefix, skip=visit.untouched)
    files.write(finished.items())
    if journal is not None:
        with visit.clock.measure("journal"):
            kept = journal.keep(finished, leaving)
        journal.add(kept)
    for block in (visit.block, *(path.block for path in walks)):  # the visit itself may live on
        block.to("meta")


def _copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    return deepcopy(block).to(dtype)


def activation_bytes(
    checkpoint: Checkpoint, tokens: int, forward: torch.dtype, *, with_dense: bool
) -> int:
    """Disk that a walk's activations take: what entered, enters and leaves a block."""
    width, ways = checkpoint.config.hidden_size, 1 + with_dense
    return 3 * ways * tokens * int(width) * _activation_dtype(checkpoint, forward).itemsize


def _activation_dtype(checkpoint: Checkpoint, forward: torch.dtype) -> torch.dtype:
    """That in which blocks run, or that of the weights if it is smaller."""
    weights = checkpoint.weights.dtypes[checkpoint.stored_name(f"{checkpoint.linears[0]}.weight")]
    return min(forward, weights, key=lambda dtype: dtype.itemsize)


def waiting_bytes(checkpoint: Checkpoint, segments: Tensor, ways: int, forward: torch.dtype) -> int:
    """What passes hold that wait in a block: stream, norm, queries to values, and a layer's input.

    An estimate, from the shapes: what a pass holds where it holds most, at the layer that reads the
    feed-forward channels.

    Args:
        checkpoint: the model.
        segments: int64[count, length], what passes.
        ways: 2 if it passes the dense model as well, else 1.
        forward: the dtype in which blocks run.
    """
    widest = max(
        max(checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight")])
        for name in checkpoint.linears
    )
    return (
        forward.itemsize
        * ways
        * segments.numel()
        * (widest + 2 * int(checkpoint.config.hidden_size))
    )


def stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as it is written: cast, and without -0.0.

    Kernels that compress 2:4 weights by their bit patterns take -0.0 for a value (vLLM pull
    request 13198), and a small negative weight can become one in the cast.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    cast = tensor.to(dtype, copy=True).add_(0.0)
    if not bool(cast.isfinite().all()):
        raise ModelError(
            f"{name}: values up to {tensor.abs().max().item():g} do not fit {dtype}",
            fix="use --dtype bf16 or fp32",
        )
    return cast


class _Files:
    """Moves parameters between a model without storage, its checkpoint, and the copy."""

    def __init__(self, checkpoint: Checkpoint, copy: WeightsCopy | None) -> None:
        self._checkpoint = checkpoint
        self._copy = copy

    def load(
        self,
        module: nn.Module,
        prefix: str,
        *,
        skip: str | None = None,
        dtype: torch.dtype | None,
        device: torch.device = CPU,
    ) -> None:
        """Give a module its weights.

        Args:
            module: the module.
            prefix: what its parameters' full names begin with.
            skip: a submodule that gets none, by its full name.
            dtype: of the weights; None for their own where they will be written in that, and
                float32 for the others.
            device: where to, buffers included.
        """
        sources = {
            name: self._checkpoint.stored_name(prefix + name)
            for name, _ in module.named_parameters()
            if skip is None or not f"{prefix}{name}".startswith(f"{skip}.")
        }
        weights = self._checkpoint.weights
        for name, source in sources.items():
            shape = tuple(module.get_parameter(name).shape)
            if weights.shapes[source] != shape:
                raise ModelError(
                    f"{self._checkpoint.folder}: {source} has shape {weights.shapes[source]}, "
                    f"config.json says {shape}",
                    fix="use the config.json and the weights of the same checkpoint",
                )
        state = {
            name: weights.read([source], dtype or self._own_dtype(source), device)[source]
            for name, source in sources.items()
        }
        module.load_state_dict(state, strict=False, assign=True)
        if skip is None:  # what was skipped has no storage to move
            module.to(device)

    def dtypes(self, module: nn.Module, prefix: str) -> dict[str, torch.dtype]:
        """The dtype in which each parameter of a module will be written."""
        return {
            name: self._dtype(self._checkpoint.stored_name(prefix + name))
            for name, _ in module.named_parameters()
        }

    def finished(
        self, module: nn.Module, prefix: str, *, skip: Collection[str]
    ) -> dict[str, Tensor]:
        """The parameters of a module, on the host, as they are to be written; none without a copy.

        Those to skip are left to `copy_rest`.
        """
        if self._copy is None:
            return {}
        return {
            target: stored(parameter, self._dtype(target), target).cpu()
            for name, parameter in module.named_parameters()
            if name not in skip
            for target in [self._checkpoint.stored_name(prefix + name)]
        }

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors by the names that they have in the checkpoint."""
        if self._copy is not None:
            for name, tensor in tensors:
                self._copy.write(name, tensor)

    def copy_rest(self) -> None:
        """Write what has not been written yet as it is in the checkpoint."""
        if self._copy is None:
            return
        for name in self._copy.missing:
            dtype = self._dtype(name)
            same = dtype == self._checkpoint.weights.dtypes[name]
            self._copy.write_pieces(
                name,
                (
                    (start, piece if same else stored(piece, dtype, name))
                    for start, piece in self._checkpoint.weights.pieces(name)
                ),
            )

    def _own_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype if it is read and written in the same one of 32 bits or less."""
        dtype = self._dtype(name)
        same = dtype == self._checkpoint.weights.dtypes[name]
        return dtype if same and dtype.itemsize <= torch.float32.itemsize else torch.float32

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor will be written."""
        return (
            self._checkpoint.weights.dtypes[name] if self._copy is None else self._copy.dtype(name)
        )
