"""The bundle: one output folder, its stages, and the hash of every file in it.

A bundle is built stage by stage. A stage writes into a hidden folder beside its destination; when
it is complete its files are flushed, hashed and renamed into place, and only then does
`manifest.json` say that the stage is done. Whatever moment a run is killed at, the manifest names
complete stages only, and repeating the command continues from there. A long stage may keep a
journal in another hidden folder, which outlives a run that is killed.

Nothing in a manifest is an absolute path, so a bundle can be moved.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar, overload

from thanos_deploy.bundle import layout, lock, names, written
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.files import (
    PARTIAL,
    FileRecord,
    Json,
    file_record,
    replace_json,
    sha256_of,
)
from thanos_deploy.bundle.layout import MANIFEST as MANIFEST
from thanos_deploy.bundle.record import FORMAT as FORMAT
from thanos_deploy.bundle.record import (
    Inputs,
    Manifest,
    Options,
    Result,
    Source,
    Stage,
    differences,
    read_manifest,
)
from thanos_deploy.bundle.record import StageRecord as StageRecord
from thanos_deploy.errors import InputError, IntegrityError, UsageError
from thanos_deploy.machine import environment

_JOURNAL = ".journal-"

T = TypeVar("T")


@dataclass(slots=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        path: the folder.
        source: the model that it was made from.
        stages: the finished stages by name, in the order in which they finished.
        held: what keeps others from writing there; None for a bundle that is only read.
    """

    path: Path
    source: Source
    stages: dict[str, StageRecord] = field(default_factory=dict)
    held: lock.Lock | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle.

        Raises:
            InputError: there is no bundle, it is of a format that this version cannot read, or a
                name in it or a link leads out of its folder.
        """
        manifest = read_manifest(path)
        return cls(path, manifest.source, manifest.stages)

    def has(self, stage: Stage[Options, Inputs, Result]) -> bool:
        """The stage is finished."""
        return stage.name in self.stages

    def options(self, stage: Stage[Options, Inputs, Result]) -> Options:
        """What a finished stage was made with.

        Raises:
            InputError: the manifest has something else there.
        """
        return self._read(stage, "options", self.stages[stage.name].options, stage.options)

    def inputs(self, stage: Stage[Options, Inputs, Result]) -> Inputs:
        """The hashes of what a finished stage read; see `options`."""
        return self._read(stage, "inputs", self.stages[stage.name].inputs, stage.inputs)

    def result(self, stage: Stage[Options, Inputs, Result]) -> Result:
        """What a finished stage reports; see `options`."""
        return self._read(stage, "result", self.stages[stage.name].result, stage.result)

    def _read(
        self, stage: Stage[Options, Inputs, Result], part: str, value: Json, cls: type[T]
    ) -> T:
        try:
            return decode(cls, value)
        except ValueError as error:
            raise InputError(
                f"{self.path / MANIFEST}: {part} of stage {stage.name!r}: {error}",
                fix="restore the file from a copy of the bundle, or make that stage again with "
                "--overwrite",
            ) from error

    def require(self, stage: str, command: str) -> StageRecord:
        """The record of a stage that must be finished.

        Raises:
            InputError: it is not; the message names the command that finishes it.
        """
        if stage not in self.stages:
            raise InputError(
                f"{self.path}: stage {stage!r} is not finished", fix=f"run {command} first"
            )
        return self.stages[stage]

    def stages_of(self, folder: str) -> list[str]:
        """The finished stages that wrote into a folder of the bundle."""
        return [
            stage
            for stage, record in self.stages.items()
            if any(name.startswith(f"{folder}/") for name in record.files)
        ]

    @property
    def model_sha256(self) -> str:
        """One hash for the pruned model: over the hashes of its files."""
        files = self.stages[layout.PRUNE].files
        model = f"{layout.MODEL}/"
        return sha256_of(
            {name: file.sha256 for name, file in files.items() if name.startswith(model)}
        )

    def hashes(self, stage: str) -> dict[str, str]:
        """The hashes of the files of a finished stage, by name."""
        return {name: file.sha256 for name, file in self.stages[stage].files.items()}

    @property
    def graph_sha256(self) -> dict[str, str]:
        """The hashes of the files of the exported graph."""
        return self.hashes(layout.ONNX)

    def source_of(self, engine: str) -> str:
        """The stage with the graph that an engine was built from; it may be gone."""
        found = next((name for name in self.stages[engine].inputs if name != "model"), None)
        return names.plain(found, self.path / MANIFEST)

    def source_is_current(self, engine: str) -> bool:
        """The graph that an engine was built from is the one that is there."""
        source = self.source_of(engine)
        return source in self.stages and self.hashes(source) == self.stages[engine].inputs[source]

    def recorded(self, name: str) -> bool:
        """A finished stage wrote this file, so its hash is known."""
        return any(name in record.files for record in self.stages.values())

    def unrecorded(self, folder: str) -> list[str]:
        """The files below a folder of the bundle that no finished stage wrote, sorted.

        Hidden ones do not count: nothing in a bundle is called like that, and nothing reads them.
        """
        found = (path.relative_to(self.path) for path in (self.path / folder).rglob("*"))
        return sorted(
            name.as_posix()
            for name in found
            if (self.path / name).is_file()
            and not any(part.startswith(".") for part in name.parts)
            and not self.recorded(name.as_posix())
        )

    def check(
        self, stage: Stage[Options, Inputs, Result] | str, options: object, *, overwrite: bool
    ) -> None:
        """Refuse options that differ from those a finished stage was made with.

        Raises:
            UsageError: they differ and may not be overwritten.
        """
        name = stage if isinstance(stage, str) else stage.name
        done, wanted = self.stages.get(name), encode(options)
        if done is None or done.options == wanted or overwrite:
            return
        raise UsageError(
            f"{self.path}: stage {name!r} was made with other options: "
            f"{differences(done.options, wanted)}",
            fix="give another output folder with -o, or --overwrite to redo that stage",
        )

    @overload
    def run(
        self,
        stage: Stage[Options, Inputs, Result],
        produce: Callable[[Path], Result],
        *,
        options: Options,
        inputs: Inputs,
        overwrite: bool = False,
    ) -> StageRecord: ...

    @overload
    def run(
        self,
        stage: str,
        produce: Callable[[Path], Json],
        *,
        options: Json,
        inputs: Json,
        overwrite: bool = False,
    ) -> StageRecord: ...

    def run(
        self,
        stage: Stage[Options, Inputs, Result] | str,
        produce: Callable[[Path], object],
        *,
        options: object,
        inputs: object,
        overwrite: bool = False,
    ) -> StageRecord:
        """The record of a stage, produced now unless it is already there and intact.

        Args:
            stage: which; by name alone for one whose records are of no type.
            produce: writes the stage's files into the folder that it is given and returns the
                stage's result. Every entry of that folder replaces the entry of the same name in
                the bundle; in a folder that other stages wrote to as well, its entries do.
            options: what the stage is made with.
            inputs: hashes of what it reads.
            overwrite: redo a stage that was made with other options or whose files changed.

        Raises:
            UsageError: made with other options, and not `overwrite`.
            IntegrityError: a file changed since the stage was made, and not `overwrite`.
        """
        name = stage if isinstance(stage, str) else stage.name
        self.check(name, options, overwrite=overwrite)
        made_with, made_from = encode(options), encode(inputs)
        done = self.stages.get(name)
        if done is not None and done.options == made_with and done.inputs == made_from:
            try:
                self.verify(name)
                shutil.rmtree(self.journal(name), ignore_errors=True)
                return done
            except IntegrityError:
                if not overwrite:
                    raise
        started = time.perf_counter()
        partial = self.path / f"{PARTIAL}{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            result = produce(partial)
            record = StageRecord(
                options=made_with,
                inputs=made_from,
                files=written.flushed(partial),
                result=encode(result),
                seconds=round(time.perf_counter() - started, 3),
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                environment=environment.describe(),
            )
            self._replace(name, partial, record)
            shutil.rmtree(self.journal(name), ignore_errors=True)
        except (InputError, UsageError):  # the same run would end there again
            shutil.rmtree(self.journal(name), ignore_errors=True)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return record

    def journal(self, stage: str) -> Path:
        """The folder of a stage's journal, from which it resumes; removed when it is finished."""
        return self.path / f"{_JOURNAL}{stage}"

    def verify(self, *stages: str) -> None:
        """Hash the files of the named stages, or of all, and compare.

        Raises:
            IntegrityError: a file is missing or differs, or no stage wrote it and it lies where a
                model, a graph or an engine is read from; the message names it.
        """
        for stage in stages or tuple(self.stages):
            files = self.stages[stage].files
            for name, recorded in files.items():
                self._compare(stage, name, recorded)
            for folder in dict.fromkeys(filter(None, map(layout.read_as_a_whole, files))):
                self.refuse(self.unrecorded(folder))

    def refuse(self, unrecorded: Iterable[str]) -> None:
        """Refuse files that no stage wrote, where there are any.

        Raises:
            IntegrityError: there are; the message names the first.
        """
        for name in unrecorded:
            raise IntegrityError(
                f"{self.path / name}: no stage of the bundle wrote this file, and it would "
                "be loaded together with the files that a stage wrote",
                fix="remove the file; or, if the model needs it, add it to the model that the "
                "bundle was made from, and make the bundle again",
            )

    def verify_file(self, name: str) -> None:
        """Hash one file of whichever stage wrote it, and compare.

        Raises:
            InputError: no stage wrote such a file.
            IntegrityError: it is missing or differs.
        """
        for stage, record in self.stages.items():
            if name in record.files:
                return self._compare(stage, name, record.files[name])
        raise InputError(
            f"{self.path / name}: no stage of the bundle wrote this file",
            fix="make the bundle again from a model that has this file",
        )

    def _compare(self, stage: str, name: str, recorded: FileRecord) -> None:
        path = self.path / name
        actual = file_record(path) if path.is_file() else None
        if actual != recorded:
            seen = (
                "is missing"
                if actual is None
                else f"has {actual.bytes} bytes, SHA-256 {actual.sha256}"
            )
            raise IntegrityError(
                f"{path}: {seen}; stage {stage!r} wrote {recorded.bytes} bytes, SHA-256 "
                f"{recorded.sha256}",
                fix="restore the file, or repeat the command that made the bundle with "
                "--overwrite to make that stage again",
            )

    def _replace(self, stage: str, partial: Path, record: StageRecord) -> None:
        if self.held is not None:
            self.held.require()
        # While entries are being moved the stage must not count as done, and without a manifest
        # nobody would take the folder for a bundle.
        if self.stages.pop(stage, None) is not None or not (self.path / MANIFEST).exists():
            self._save()
        others = {name for other in self.stages.values() for name in other.files}
        written.move(partial, self.path, others)
        self.stages[stage] = record
        self._save()

    def _save(self) -> None:
        replace_json(self.path / MANIFEST, encode(Manifest(FORMAT, self.source, self.stages)))


@contextmanager
def claim(
    path: Path, source: Source, *, overwrite: bool = False, wait: bool = False
) -> Iterator[Bundle]:
    """Open or create the bundle at `path` for writing; no other process can until this one ends.

    Args:
        path: the output folder; it may not exist yet.
        source: the model that the bundle is made from.
        overwrite: start over when the folder holds a bundle of another model.
        wait: wait for another process instead of refusing.

    Raises:
        UsageError: the folder holds something else, or a bundle of another model.
        InputError: a name in its manifest or a link leads out of the folder.
        PlatformError: another process is writing there, on this machine or on another one.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", fix="give a folder with -o")
    foreign = path.is_dir() and not (path / MANIFEST).exists()
    own = (PARTIAL, _JOURNAL, lock.LOCK)
    if foreign and any(not entry.name.startswith(own) for entry in path.iterdir()):
        raise UsageError(
            f"{path} is not empty and not a bundle: it has no {MANIFEST}",
            fix="give a new or empty folder with -o; nothing was changed there",
        )
    path.mkdir(parents=True, exist_ok=True)
    names.require_own(path)  # before a link is written through
    with lock.hold(path, wait=wait) as held:
        for leftover in path.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        bundle = Bundle.open(path) if (path / MANIFEST).exists() else Bundle(path, source)
        bundle.held = held
        if bundle.source.sha256 != source.sha256:
            if not overwrite:
                raise UsageError(
                    f"{path}: this bundle was made from {bundle.source.name} (SHA-256 "
                    f"{bundle.source.sha256[:12]}), not from {source.name} "
                    f"({source.sha256[:12]})",
                    fix="give another output folder with -o, or --overwrite",
                )
            bundle = Bundle(path, source, held=held)
        yield bundle
