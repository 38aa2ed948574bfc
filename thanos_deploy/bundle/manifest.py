"""The bundle: one output folder, its stages, and the hash of every file in it.

A bundle is built stage by stage. A stage writes into a hidden folder beside its destination. When
the stage is complete, its files are flushed, hashed and renamed into place, and only then does
`manifest.json` name the stage. So the manifest names only complete stages, even if a run is killed
at any moment, and repeating the command continues after the last complete stage. A long stage may
keep a journal in another hidden folder, which remains when a run is killed.

Nothing in a manifest is an absolute path, so a bundle can be moved.

Only `Bundle` changes a manifest, so all that does is in this file, which is longer than others.
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
        source: the model that the bundle was made from.
        stages: the finished stages by name, in the order in which they finished.
        held: the lock against other writers; None for a bundle that is only read.
    """

    path: Path
    source: Source
    stages: dict[str, StageRecord] = field(default_factory=dict)
    held: lock.Lock | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle.

        Raises:
            InputError: there is no bundle, this version cannot read its format, or a file name or
                link in it leads out of its folder.
        """
        manifest = read_manifest(path)
        return cls(path, manifest.source, manifest.stages)

    def has(self, stage: Stage[Options, Inputs, Result]) -> bool:
        """Whether the stage is finished."""
        return stage.name in self.stages

    def options(self, stage: Stage[Options, Inputs, Result]) -> Options:
        """Return the options of a finished stage.

        Raises:
            InputError: what the manifest has there is not of the stage's type.
        """
        return self._read(stage, "options", self.stages[stage.name].options, stage.options)

    def inputs(self, stage: Stage[Options, Inputs, Result]) -> Inputs:
        """Return the hashes of the inputs of a finished stage; for errors see `options`."""
        return self._read(stage, "inputs", self.stages[stage.name].inputs, stage.inputs)

    def result(self, stage: Stage[Options, Inputs, Result]) -> Result:
        """Return the result of a finished stage; for errors see `options`."""
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
        """Return the record of a stage that must be finished.

        Args:
            stage: name of the stage.
            command: the command that finishes it, for the message.

        Raises:
            InputError: the stage is not finished.
        """
        if stage not in self.stages:
            raise InputError(
                f"{self.path}: stage {stage!r} is not finished", fix=f"run {command} first"
            )
        return self.stages[stage]

    def stages_of(self, folder: str) -> list[str]:
        """Return the names of the finished stages that wrote into a folder of the bundle."""
        return [
            stage
            for stage, record in self.stages.items()
            if any(name.startswith(f"{folder}/") for name in record.files)
        ]

    @property
    def model_sha256(self) -> str:
        """The hash of the pruned model, computed from the hashes of its files."""
        files = self.stages[layout.PRUNE].files
        model = f"{layout.MODEL}/"
        return sha256_of(
            {name: file.sha256 for name, file in files.items() if name.startswith(model)}
        )

    def hashes(self, stage: str) -> dict[str, str]:
        """Return the hashes of the files of a finished stage, by path."""
        return {name: file.sha256 for name, file in self.stages[stage].files.items()}

    @property
    def graph_sha256(self) -> dict[str, str]:
        """The hashes of the files of the exported ONNX graph, by path."""
        return self.hashes(layout.ONNX)

    def source_of(self, engine: str) -> str:
        """Return the name of the stage whose graph an engine was built from.

        The bundle may no longer have this stage.

        Raises:
            InputError: the manifest names no valid stage there.
        """
        found = next((name for name in self.stages[engine].inputs if name != "model"), None)
        return names.plain(found, self.path / MANIFEST)

    def source_is_current(self, engine: str) -> bool:
        """Whether the bundle still has the graph that an engine was built from, unchanged."""
        source = self.source_of(engine)
        return source in self.stages and self.hashes(source) == self.stages[engine].inputs[source]

    def recorded(self, name: str) -> bool:
        """Whether a finished stage wrote this file, so that its hash is known."""
        return any(name in record.files for record in self.stages.values())

    def unrecorded(self, folder: str) -> list[str]:
        """Return the files below a folder of the bundle that no finished stage wrote, sorted.

        Hidden files are left out: no stage writes files with such names, and nothing reads them.
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
        """Refuse options that differ from those of a finished stage.

        Raises:
            UsageError: the options differ and `overwrite` is false.
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
        """Make a stage, unless it is finished and intact, and return its record.

        A finished stage with the same options but other inputs is made again.

        Args:
            stage: the stage; its name alone if its records have no type.
            produce: writes the stage's files into the folder that it is given and returns the
                stage's result. Every entry of that folder replaces the entry of the same name in
                the bundle. A folder in which other stages have files is not replaced as a whole:
                only its entries are.
            options: the options of the stage.
            inputs: hashes of what the stage reads.
            overwrite: redo a stage that was made with other options or whose files were changed.

        Raises:
            UsageError: the stage was made with other options, and `overwrite` is false.
            IntegrityError: a file was changed after the stage was made, and `overwrite` is false.
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
        except (InputError, UsageError):  # resuming would fail again at the same point
            shutil.rmtree(self.journal(name), ignore_errors=True)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return record

    def journal(self, stage: str) -> Path:
        """Return the folder of a stage's journal, which is removed when the stage is finished."""
        return self.path / f"{_JOURNAL}{stage}"

    def verify(self, *stages: str) -> None:
        """Compare the files of the named stages, or of all stages, with their recorded hashes.

        Raises:
            IntegrityError: a file is missing or differs, or a file that no stage wrote is in a
                folder from which a model, a graph or an engine is loaded. The message names it.
        """
        for stage in stages or tuple(self.stages):
            files = self.stages[stage].files
            for name, recorded in files.items():
                self._compare(stage, name, recorded)
            for folder in dict.fromkeys(filter(None, map(layout.read_as_a_whole, files))):
                self.refuse(self.unrecorded(folder))

    def refuse(self, unrecorded: Iterable[str]) -> None:
        """Refuse the given files, which no stage wrote; do nothing if there are none.

        Raises:
            IntegrityError: there is a file; the message names the first one.
        """
        for name in unrecorded:
            raise IntegrityError(
                f"{self.path / name}: no stage of the bundle wrote this file, and it would "
                "be loaded together with the files that a stage wrote",
                fix="remove the file; or, if the model needs it, add it to the model that the "
                "bundle was made from, and make the bundle again",
            )

    def verify_file(self, name: str) -> None:
        """Compare one file with its recorded hash.

        Raises:
            InputError: no stage wrote this file.
            IntegrityError: the file is missing or differs.
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
        # While its files are moved, the manifest must not name the stage. A manifest must exist
        # from the start, because a folder with files and no manifest is refused as a bundle.
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
    """Open or create the bundle at `path` and lock it for writing inside the `with` block.

    Args:
        path: the output folder; it need not exist yet.
        source: the model that the bundle is made from.
        overwrite: start over if the folder contains a bundle of another model.
        wait: wait while another process has the lock, instead of raising `PlatformError`.

    Raises:
        UsageError: the folder contains something other than a bundle, or, unless `overwrite`, a
            bundle of another model.
        InputError: the manifest is unreadable, or a file name or link leads out of the folder.
        PlatformError: another process, on this machine or on another one, is writing there.
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
    names.require_own(path)  # before anything is written through a link
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
