"""The stage prune: write a sparse or smaller checkpoint, and a report on each layer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import decode
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.calibration.journal_folder import owner_of
from thanos_deploy.errors import UsageError
from thanos_deploy.forecast import memory_check
from thanos_deploy.machine import devices, environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.parts import part_bytes
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning.result import (
    PRUNE,
    PartBytes,
    PruneOptions,
    PruneResult,
    Quantisation,
    Recovery,
)
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.start import disconnect
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.prune_messages import Begun, Folders, Threads
from thanos_deploy.stages.prune_work import BLOCKS, SURVEY, THREADS, WALKS, Pruned, Work
from thanos_deploy.stages.request import PruneRequest

logger = logging.getLogger(__name__)


def prune(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Prune the model into the bundle, unless the stage is finished.

    With several ranks, rank 0 calls this function, and the other ranks call `follow`.
    """
    with _threads_of(bundle.journal(layout.PRUNE)):
        return _prune(bundle, dense, request, overwrite=overwrite, announce=announce)


def _prune(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    *,
    overwrite: bool,
    announce: Announce,
) -> StageRecord:
    work = Work.of(dense, request, announce)
    begun = Begun(None)

    def produce(folder: Path) -> PruneResult:
        nonlocal begun
        model, kept = folder / layout.MODEL, bundle.journal(layout.PRUNE)
        model.mkdir()
        kept.mkdir(exist_ok=True)
        files.require_disk(folder, work.disk_bytes - sum(files.size(kept / one) for one in WALKS))
        begun = current().from_first(Begun(Folders(kept.absolute(), folder.absolute())))
        pruned = work.run(model, kept, announce)
        files.write_record(folder / layout.LAYERS, pruned.blocks)
        recovery, quantisation = work.finish(folder, kept, announce)
        return _result(work, pruned, recovery, quantisation, model)

    with memory_check.explained(work.memory):
        record = bundle.run(
            PRUNE,
            produce,
            options=decode(PruneOptions, request.to_json()),
            inputs=work.inputs,
            overwrite=overwrite,
        )
    if begun.folders is None:
        current().from_first(begun)
    disconnect()
    return record


def follow(dense: Dense, request: PruneRequest) -> None:
    """Take part in pruning as a rank other than 0, which writes nothing to the bundle.

    Raises:
        UsageError: the folder that rank 0 writes to does not exist on this machine.
        DeployError: see `prune`.
    """
    with _threads_of(None):
        _follow(dense, request)


def _follow(dense: Dense, request: PruneRequest) -> None:
    work = Work.of(dense, request, quietly)
    if folders := current().from_first(Begun(None)).folders:
        kept = folders.journals
        if not kept.is_dir():
            raise UsageError(
                f"rank {current().rank}: {kept} does not exist on this machine, although "
                "rank 0 writes to it",
                fix="give a folder with -o that all machines share",
            )
        (kept / f".rank-{current().rank}").touch()  # fail now if it is not writable
        work.run(None, kept, quietly)
        work.finish(folders.stage, kept, quietly)
    disconnect()


def _threads_before(kept: Path) -> int | None:
    """Return the number of threads with which the journals were begun; None without journals."""
    for name in (BLOCKS, SURVEY):
        if owner := owner_of(kept / name):
            threads = owner.get(THREADS)
            return threads if isinstance(threads, int) else None
    return None


@contextmanager
def _threads_of(kept: Path | None) -> Iterator[None]:
    """Use the number of threads with which an interrupted run began, on all ranks.

    The last bit of a matrix product depends on the number of threads, and a run that continues may
    have another number of ranks.

    Args:
        kept: folder of the journals; None on ranks that do not open it.
    """
    own, begun = torch.get_num_threads(), None if kept is None else _threads_before(kept)
    threads = current().from_first(Threads(begun)).count
    if threads is not None and 0 < threads != own:
        logger.info("continuing with %d threads for each process, as before", threads)
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _result(
    work: Work,
    pruned: Pruned,
    recovery: Recovery | None,
    quantisation: Quantisation | None,
    model: Path,
) -> PruneResult:
    """Assemble the result of the stage."""
    summed, blocks, survey = pruned.summed, pruned.blocks, pruned.survey

    def spent(activity: str) -> float:
        return sum((block.seconds.get(activity, 0.0) for block in blocks), 0.0)

    return PruneResult(
        **{field.name: getattr(summed, field.name) for field in fields(summed)},
        widths=pruned.widths,
        choices=pruned.choices,
        recovery=recovery,
        quantisation=quantisation,
        frame=work.calibration.frame,
        survey_seconds=sum(sum(one.seconds.values()) for one in survey.reports) if survey else None,
        collect_seconds=spent("collect"),
        solve_seconds=spent("solve"),
        tune_seconds=spent("tune"),
        forward_seconds=spent("forward"),
        journal_seconds=spent("journal"),
        device=devices.describe(work.device),
        peak_memory_bytes=environment.peak_memory_bytes(),
        dense_bytes=work.source.bytes_in("auto"),
        parts=PartBytes(part_bytes(work.source), part_bytes(Checkpoint.open(model))),
        tune_segments=work.tune_segments,
        discovered=work.source.family.discovered,
    )
