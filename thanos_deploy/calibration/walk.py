"""Walk a checkpoint block by block with calibration data, one block's weights in memory at a time.

A GPU, if there is one, holds the current block, its copies and the tensors computed for it, the
batch that passes it, and the next block, which is read meanwhile. The checkpoint and the embeddings
stay on the host, and so do the hidden states between two blocks unless the GPU has enough memory.

The hidden states that enter a block are the outputs of the blocks before it, as those are now,
changed or not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_deploy.calibration.activations import Activations, Place, StoredInputs, memory_for
from thanos_deploy.calibration.blocks import BlockInputs, block_inputs, shared
from thanos_deploy.calibration.collect import Walk, advance
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.parameters import ParameterFiles
from thanos_deploy.calibration.sizes import activation_dtype, can_wait
from thanos_deploy.calibration.visit import Clock, Visit
from thanos_deploy.machine import devices, environment
from thanos_deploy.machine.background import Ahead, Background
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.structure import blocks_of
from thanos_deploy.model.tensorfile import Kind, TensorFile
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.shards import Layout

# The report on one block.
R = TypeVar("R")


def visit_blocks(
    checkpoint: Checkpoint,
    segments: Tensor,
    work: Callable[[Visit], R],
    *,
    copy: WeightsCopy | None = None,
    further: Tensor | None = None,
    tuned_in: torch.dtype | None = None,
    with_dense: bool = False,
    forward: torch.dtype = torch.float32,
    journal: Journal[R] | None = None,
    device: torch.device = CPU,
    hold: Place = "auto",
    on_progress: OnProgress = silent,
) -> list[R]:
    """Call `work` on every block in order; later blocks see the outputs of the changed ones.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        work: processes a block, in place, and returns the report on it.
        copy: where to write every processed block, and at the end, unchanged, everything outside
            the blocks; None to write nothing.
        further: int64[count, length], tokens that are used for tuning only; None for none.
        tuned_in: see `Visit`; the further tokens pass the blocks in this dtype as well.
        with_dense: whether to run the data through the unchanged blocks as well.
        forward: the dtype in which blocks run, float32 or bfloat16.
        journal: where to keep every finished block and its report; the blocks that it already has
            are not processed again.
        device: where a block is while it is processed.
        hold: where the hidden states between two blocks are; see `activations.memory_for`.
        on_progress: called after every finished block.

    Returns:
        the report on each block, in order.

    Raises:
        ModelError: weights are missing, have NaN, or are not those that config.json describes; or
            hidden states do not fit the dtype of the weights.
        ResourceError: a block does not fit into the GPU's memory.
    """
    reports = [] if journal is None else list(journal.reports)
    count = checkpoint.config.num_hidden_layers
    on_progress(len(reports), count)
    for visit in _visits(
        checkpoint,
        segments,
        reports,
        copy=copy,
        further=further,
        tuned_in=tuned_in,
        with_dense=with_dense,
        forward=forward,
        journal=journal,
        device=device,
        hold=hold,
    ):
        reports.append(work(visit))
        if journal is not None:  # so that a kill loses at most one of the blocks reported as done
            journal.finish()
        on_progress(len(reports), count)
    return reports


def visits(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    further: Tensor | None = None,
    tuned_in: torch.dtype | None = None,
    with_dense: bool = False,
    forward: torch.dtype = torch.float32,
    device: torch.device = CPU,
    hold: Place = "auto",
) -> Iterator[Visit]:
    """Yield the visits of `visit_blocks`, for callers that may stop early and write nothing.

    Args and Raises: see `visit_blocks`.
    """
    return _visits(
        checkpoint,
        segments,
        [],
        copy=None,
        further=further,
        tuned_in=tuned_in,
        with_dense=with_dense,
        forward=forward,
        journal=None,
        device=device,
        hold=hold,
    )


@torch.no_grad()
def _visits(
    checkpoint: Checkpoint,
    segments: Tensor,
    reports: Sequence[R],
    *,
    copy: WeightsCopy | None,
    further: Tensor | None,
    tuned_in: torch.dtype | None,
    with_dense: bool,
    forward: torch.dtype,
    journal: Journal[R] | None,
    device: torch.device,
    hold: Place,
) -> Iterator[Visit]:
    """Yield a visit to every block that is not in the journal yet, in order.

    Args:
        reports: with a journal, the caller's list, to which it adds the report on a block before it
            asks for the next visit.
        checkpoint, segments, copy, further, tuned_in, with_dense, forward, journal, device, hold:
            see `visit_blocks`.
    """
    family = checkpoint.family
    model = checkpoint.skeleton()
    blocks = blocks_of(model, family)
    files = ParameterFiles(checkpoint, copy)
    files.load(model.base_model, f"{family.base}.", skip=family.blocks, dtype=forward)
    first = 0
    if journal is not None:
        first = len(journal.reports)
        for index in range(first):
            files.write(files.among(journal.parameters(index)))
    with ExitStack() as stack:
        folder = journal.folder if journal else Path(stack.enter_context(TemporaryDirectory()))
        activations, walks = _enter(
            checkpoint,
            model,
            segments,
            further,
            folder,
            first,
            tuned_in=tuned_in,
            with_dense=with_dense,
            forward=forward,
            device=device,
            hold=hold,
            filed=journal is not None,
        )
        stack.callback(activations.close)
        if journal is not None:
            stack.callback(journal.close)
        model.get_input_embeddings().to("meta")
        environment.return_freed_memory()
        background = Background(device)
        stack.callback(background.close)

        def read(index: int) -> dict[str, Tensor]:
            with devices.memory_for(f"block {index}"):
                return files.read(
                    blocks[index],
                    checkpoint.blocks[index].prefix,
                    dtype=torch.float32 if forward is torch.float32 else None,
                    device=device,
                )

        coming = Ahead(read, background)
        for index in range(first, len(blocks)):
            block, structure = blocks[index], checkpoint.blocks[index]
            weights = coming.take(index, index + 1 if index + 1 < len(blocks) else None)
            background.hand_over(weights.values())
            with devices.memory_for(f"block {index}"):
                block.load_state_dict(weights, strict=False, assign=True)
                del weights
                block.to(device)  # its buffers
                running = block if _is_in(block, forward) else _copy(block, forward)
                dense = _copy(block, forward) if with_dense else None
            visit = Visit(
                index=index,
                structure=structure,
                block=block,
                walk=Walk(index, running, walks["pruned"]),
                dense=None if dense is None else Walk(index, dense, walks["dense"]),
                dtypes=files.dtypes(block, structure.prefix),
                can_wait=can_wait(checkpoint, segments, len(walks), forward),
                clock=Clock(device=device),
                tuned_in=tuned_in,
            )
            yield visit
            with devices.memory_for(f"block {index}"):
                entering = activations if index + 1 < len(blocks) else None
                _leave(visit, files, entering, journal, reports)
            environment.return_freed_memory()
        if journal is not None:
            journal.finish()
    files.copy_rest()


def _enter(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    segments: Tensor,
    further: Tensor | None,
    folder: Path,
    index: int,
    *,
    tuned_in: torch.dtype | None,
    with_dense: bool,
    forward: torch.dtype,
    device: torch.device,
    hold: Place,
    filed: bool,
) -> tuple[Activations, dict[str, list[BlockInputs]]]:
    """Prepare the calibration data before a block.

    For a block other than the first one, the hidden states are read from the files in `folder`.
    With `filed` False, files are written only if the hidden states are not held in memory.

    Returns:
        the activations, and for each model, "pruned" and perhaps "dense", its batches.
    """
    further = segments[:0] if further is None else further
    count, length = segments.shape
    batches = Layout.of(count, length, len(further)).batches
    segments = torch.cat([segments, further])
    dtype = activation_dtype(checkpoint, forward)
    ways = ("pruned", "dense") if with_dense else ("pruned",)
    kinds: dict[str, Kind] = {}
    shards: dict[str, int] = {}
    for number, one in enumerate(batches):
        shape = (one.stop - one.first, length, int(checkpoint.config.hidden_size))
        for way in ways:
            kinds[f"{way}.{number}"] = (dtype, shape)
            if current().owns(one.shard):
                shards[f"{way}.{number}"] = one.shard
    held_on = memory_for(hold, device, 2 * _bytes(kinds[name] for name in shards))
    activations = Activations(
        folder,
        index if index else -1,
        kinds,
        forward,
        device,
        held_on=held_on,
        filed=filed or held_on is None,
        shards=shards,
    )
    walks: dict[str, list[BlockInputs]] = {way: [] for way in ways}
    for number, one in enumerate(batches):
        (data,) = block_inputs(model, checkpoint.family, [segments[one.first : one.stop]])
        arguments = data.arguments
        if number:
            arguments = shared(arguments, walks["pruned"][0].arguments)
        for way in ways:
            batch = StoredInputs(
                activations,
                f"{way}.{number}",
                arguments,
                one.shard,
                counted=one.counted,
                products=None if one.counted else tuned_in,
            )
            if index == 0 and current().owns(one.shard):
                batch.leave(data.hidden)
            walks[way].append(batch)
    if index == 0:
        activations.advance()
    return activations, walks


def _leave(
    visit: Visit,
    files: ParameterFiles,
    activations: Activations | None,
    journal: Journal[R] | None,
    reports: Sequence[R],
) -> None:
    """Run the data through a block that has been visited, write the block, and free its memory.

    Args:
        visit: the block.
        files: where to write the block.
        activations: the hidden states to pass on; None after the last block.
        journal: where to keep the block as well.
        reports: with a journal, the reports on all blocks up to this one.
    """
    leaving: Sequence[TensorFile] = ()
    with visit.clock.measure("forward"):
        if activations is not None:
            for path in visit.walks:
                advance(path)
            if journal is not None:
                journal.finish()
            leaving = activations.advance()
    finished = files.finished(visit.block, visit.prefix, skip=visit.untouched)
    files.write(finished.items())
    if journal is not None:
        with visit.clock.measure("journal"):
            journal.add(reports[visit.index], {**finished, **visit.beside}, leaving)
    for block in (
        visit.block,
        *(path.block for path in visit.walks),
    ):  # the visit itself may live on
        block.to("meta")


def _bytes(kinds: Iterable[Kind]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds)


def _is_in(block: nn.Module, dtype: torch.dtype) -> bool:
    return all(parameter.dtype is dtype for parameter in block.parameters())


def _copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    return deepcopy(block).to(dtype)
