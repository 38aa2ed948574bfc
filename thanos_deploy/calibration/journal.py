"""The journal of a walk: what is on disk after every block, so that a killed run can resume.

A folder with an entry for every finished block:

    block-0007.json          its report, and size and SHA-256 of the files of the entry
    block-0007.safetensors   its parameters as they will be written, where the walk writes any
    inputs-0008-03.safetensors  the calibration data of shard 3 that enters the next block; see
                             `activations`

The JSON is flushed and renamed into place last, so an entry counts as a whole or not at all; damage
that comes later shows in the hashes. Of the inputs only the newest have to be there: those before
them are dropped when the next ones are written, and not before their own block counts as finished.

Flushing and hashing wait for the disk, and inputs of a large model are gigabytes. So a thread does
that while the next block is worked on, and an entry counts when `finish` has waited for it.

A journal belongs to one model, one calibration text, one set of options and versions. For any
other it is discarded.

Where several ranks walk, they share the folder: each writes the inputs of its own shards, and the
first one everything else. Files are by shard, not by rank, so another number of ranks can go on.
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
        parameters: the file of the block's own, as they will be written, by its name; none where
            the walk writes nothing.
        inputs: the files of what enters the next block; none after the last one.
        report: on the block.
    """

    parameters: Mapping[str, FileRecord]
    inputs: Mapping[str, FileRecord]
    report: Json


@dataclass(frozen=True, slots=True)
class _Entries:
    """As one rank tells the others."""

    entries: tuple[_Entry, ...] = ()


class Journal(Generic[R]):
    """The journal of one walk.

    Attributes:
        folder: where it is.
        reports: of the finished blocks, in order; the last one counts when `finish` has returned.
    """

    def __init__(self, folder: Path, owner: Json, report: type[R]) -> None:
        """Begin a journal, or go on with the one that is there as far as it is intact.

        Args:
            folder: for this journal alone.
            owner: everything that the results of the walk depend on.
            report: type of the reports, a frozen dataclass; see `codec`.

        Raises:
            InputError: an entry of the journal names a file outside its folder.
        """
        self.folder, self._report, self._ranks = folder, report, current()
        self._beside = self._ranks.beside()
        self._thread = Background(None)
        # As many files at a time as cores: what enters a block of a large model is gigabytes.
        self._at_a_time = torch.get_num_threads()
        self._pending: Future[None] | None = None
        opened = _Entries(tuple(self._opened(owner)) if self._ranks.first else ())
        shared = self._ranks.share(opened)
        self.reports = [decode(report, entry.report) for entry in shared.entries]

    def _opened(self, owner: Json) -> list[_Entry]:
        """The intact entries; everything else in the folder is removed."""
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
        """Names and values of what was written of a finished block; nothing of one that is gone."""
        if not self._parameters(index).exists():  # what an entry names is there
            return
        with TensorFile.open(self._parameters(index)) as file:
            for name, (_, shape) in file.kinds.items():
                yield name, file.read(name).reshape(shape)

    def add(
        self, report: R, parameters: Mapping[str, Tensor], inputs: Sequence[TensorFile]
    ) -> None:
        """Begin to make the next block count as finished.

        Args:
            report: on it.
            parameters: as they will be written; none if this rank or the walk writes nothing.
            inputs: what enters the next block, of this rank's shards; none after the last one. They
                stay open until `finish` has returned.
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
        """Wait until every block counts as finished, for all ranks.

        Not before may anybody remove what the last one began with.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread when it has done what was begun."""
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
        if self._ranks.first:
            entry = encode(_Entry(written, dict(sorted(every.items())), report))
            journal_folder.seal(self._entry(index), entry)
        self._beside.wait()

    def _intact_entries(self) -> Iterator[_Entry]:
        """The entries from the first on, as long as they and their parameters are intact."""
        index = 0
        while (path := self._entry(index)).exists():
            try:
                entry = decode(_Entry, journal_folder.unsealed(path))
                decode(self._report, entry.report)
            except ValueError:
                logger.warning("%s: damaged", path)
                return
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
