"""The journal of a walk: a record on disk of every finished block, so that a killed run can resume.

The journal is a folder with an entry for every finished block:

    block-0007.json          its report, and the size and SHA-256 of the entry's files
    block-0007.safetensors   its parameters as they will be written, if the walk writes any
    inputs-0008-03.safetensors  the hidden states of shard 3 that enter the next block; see
                             `activations`

The JSON is flushed and renamed into place last, so an entry counts as a whole or not at all; later
damage shows in the hashes. Only the newest inputs have to be there: older ones are removed once the
block that read them counts as finished.

Flushing and hashing wait for the disk, and the inputs of a large model are gigabytes. So a thread
does both while the next block is processed, and an entry counts once `finish` has waited for it.

A journal belongs to one model, one calibration text, one set of options, and one set of versions.
If any of them differs, the journal is discarded.

Several ranks share the folder: each writes the inputs of its own shards, and rank 0 writes
everything else. There is one file per shard, not per rank, so a run can resume with another number
of ranks.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.files import FileRecord, Json, file_record
from thanos_deploy.calibration import journal_folder
from thanos_deploy.calibration.journal_folder import intact
from thanos_deploy.machine.background import Background
from thanos_deploy.model.tensorfile import TensorFile
from thanos_deploy.ranks.group import current

logger = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the journal.

    Attributes:
        parameters: maps the name of the file with the block's parameters to its record; empty if
            the walk writes nothing.
        inputs: maps the names of the files with the next block's inputs to their records; empty
            after the last block.
        report: the report on the block.
    """

    parameters: Mapping[str, FileRecord]
    inputs: Mapping[str, FileRecord]
    report: Json


@dataclass(frozen=True, slots=True)
class _Entries:
    """The entries, as the message that rank 0 sends to the others."""

    entries: tuple[_Entry, ...] = ()


class Journal(Generic[R]):
    """The journal of one walk.

    Attributes:
        folder: where it is.
        reports: the reports on the finished blocks, in order; the last one counts once `finish`
            has returned.
    """

    def __init__(self, folder: Path, owner: Json, report: type[R]) -> None:
        """Begin a journal, or continue an existing one after its last intact entry.

        Args:
            folder: a folder for this journal alone.
            owner: everything that the results of the walk depend on.
            report: type of the reports, a frozen dataclass; see `codec`.

        Raises:
            InputError: an entry of the journal names a file outside its folder.
        """
        self.folder, self._report, self._ranks = folder, report, current()
        self._beside = self._ranks.with_own_group()
        self._thread = Background(None)
        # Files are flushed and hashed in parallel, because the inputs of a block are gigabytes.
        self._at_a_time = torch.get_num_threads()
        self._pending: Future[None] | None = None
        opened = _Entries(tuple(self._opened(owner)) if self._ranks.is_first else ())
        shared = self._ranks.from_first(opened)
        self.reports = [decode(report, entry.report) for entry in shared.entries]

    def _opened(self, owner: Json) -> list[_Entry]:
        """Return the intact entries, and remove everything else from the folder."""
        journal_folder.claim(self.folder, owner)
        found = len(list(self.folder.glob("block-*.json")))
        entries = list(self._intact_entries())
        while entries and not intact(self.folder, entries[-1].inputs):
            entries.pop()
        if len(entries) < found:
            logger.warning(
                "%s: %d of %d finished blocks are processed again, from block %d on",
                self.folder,
                found - len(entries),
                found,
                len(entries),
            )
        elif entries:
            logger.info("%s: continuing after %d finished blocks", self.folder, found)
        self._drop_all_but(entries)
        return entries

    def parameters(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Read the parameters of a finished block, by name; none if none were written for it."""
        # A file that an entry names was found intact, so a missing one was never written.
        if not self._parameters(index).exists():
            return
        with TensorFile.open(self._parameters(index)) as file:
            for name, (_, shape) in file.kinds.items():
                yield name, file.read(name).reshape(shape)

    def add(
        self, report: R, parameters: Mapping[str, Tensor], inputs: Sequence[TensorFile]
    ) -> None:
        """Start to write the entry of the next finished block; `finish` waits for it.

        Args:
            report: the report on the block.
            parameters: the block's parameters as they will be written; empty if this rank or the
                walk writes nothing.
            inputs: files with the inputs of the block after it, for this rank's shards; empty after
                the last block. They must stay open until `finish` has returned.
        """
        self.finish()
        written = None
        if parameters:
            kinds = {name: (one.dtype, tuple(one.shape)) for name, one in parameters.items()}
            written = TensorFile.create(self._parameters(len(self.reports)), kinds)
            for name, tensor in parameters.items():
                written.write(name, tensor)
        entry = partial(self._write, len(self.reports), encode(report), written, inputs)
        self._pending = self._thread.start(entry)
        self.reports.append(report)

    def finish(self) -> None:
        """Wait until every block that was added counts as finished, on all ranks.

        The inputs of the last block must not be removed before that.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after the work that it has begun."""
        self._thread.close()

    def _write(
        self, index: int, report: Json, parameters: TensorFile | None, inputs: Sequence[TensorFile]
    ) -> None:
        """Flush and hash the files of a block, then write its entry."""
        written: dict[str, FileRecord] = {}
        if parameters is not None:
            with parameters:
                written = _record(parameters)
        own: dict[str, FileRecord] = {}
        with ThreadPoolExecutor(self._at_a_time) as pool:
            for record_ in pool.map(_record, inputs):
                own |= record_
        every = self._beside.merge(own, FileRecord)
        if self._ranks.is_first:
            entry = encode(_Entry(written, dict(sorted(every.items())), report))
            journal_folder.seal(self._entry(index), entry)
        self._beside.barrier()

    def _intact_entries(self) -> Iterator[_Entry]:
        """Yield the entries from the first on, as far as they and their parameters are intact."""

        def read(content: Json) -> _Entry:
            entry = decode(_Entry, content)
            decode(self._report, entry.report)
            return entry

        index = 0
        while (entry := journal_folder.found(self._entry(index), read)) is not None:
            if not intact(self.folder, entry.parameters):
                return
            yield entry
            index += 1

    def _drop_all_but(self, entries: Sequence[_Entry]) -> None:
        kept = {self._entry(index).name for index in range(len(entries))}
        kept.update(name for entry in entries for name in (*entry.parameters, *entry.inputs))
        journal_folder.drop_all_but(self.folder, kept)

    def _entry(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.json"

    def _parameters(self, index: int) -> Path:
        return self._entry(index).with_suffix(".safetensors")


def _record(file: TensorFile) -> dict[str, FileRecord]:
    file.sync()
    return {file.path.name: file_record(file.path)}
