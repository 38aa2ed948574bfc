"""Records of a measurement run on a GPU: a journal during the run, one document after it.

    journal   JSON lines: every row is on disk before the next one is measured
    document  one JSON value: benchmarks/results/gpu/*.json, and what `gpu-check` writes

Everything that prints or uses such a figure reads it through this module. Standard library only.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from thanos_deploy.bundle.codec import Json, decode, encode, loads
from thanos_deploy.errors import InputError
from thanos_deploy.gpu.rows import KINDS, Card, Row, StepRow

FORMAT = 1

Status = Literal["VALID", "INVALID", "REHEARSAL"]
R = TypeVar("R", bound=Row)

_NAMES = {cls: name for name, cls in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Records:
    """All rows of one run, in the order in which they were measured."""

    rows: tuple[Row, ...]

    def of(self, kind: type[R]) -> tuple[R, ...]:
        """The rows of one kind, such as `of(GemmRow)`."""
        return tuple(row for row in self.rows if isinstance(row, kind))

    @property
    def card(self) -> Card | None:
        """The GPU that was measured; None if the run ended before it was recorded."""
        return next(iter(self.of(Card)), None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the times are not to be trusted; empty if there is no such reason."""
        found = dict[str, None]()
        if self.card is None:
            found["the records do not say which GPU was measured"] = None
        elif self.card.device != "cuda":
            found["this was a rehearsal on a CPU, so its times mean nothing"] = None
        for step in self.of(StepRow):
            for process in step.other_processes:
                found[f"another process used the GPU: {process}"] = None
            if names := ", ".join(step.throttle_reasons):
                found[f"the GPU lowered its clock in step {step.step}: {names}"] = None
        return tuple(found)

    @property
    def status(self) -> Status:
        """REHEARSAL for a run on a CPU, INVALID if there are `reasons`, else VALID."""
        if self.card is not None and self.card.device != "cuda":
            return "REHEARSAL"
        return "INVALID" if self.reasons else "VALID"


class Journal:
    """A file to which rows are appended; each is on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        """Open a file to append to; it is created if it does not exist.

        An incomplete last line, left by a writer that was killed, is cut off first.
        """
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write a row and flush it to disk."""
        self._file.write(json.dumps(_encoded(row)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_journal(path: Path) -> tuple[Row, ...]:
    """Read the rows of a journal; empty if the file does not exist.

    An incomplete last line is left out, because the writer may have been killed.

    Raises:
        InputError: another line cannot be read as a row.
    """
    if not path.exists():
        return ()
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    assert "\n" not in torn
    return tuple(_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1))


def write(path: Path, records: Records) -> None:
    """Write the document of a run and rename it into place when it is complete."""
    document = {
        "format": FORMAT,
        "status": records.status,
        "reasons": list(records.reasons),
        "rows": [_encoded(row) for row in records.rows],
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Records:
    """Read the document of a run.

    Raises:
        InputError: it cannot be read, or it has a format that this version does not know.
    """
    try:
        document = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise _unreadable(path, "it has no list of rows")
    if document.get("format") != FORMAT:
        raise InputError(
            f"{path}: GPU records of format {document.get('format')!r}; this version reads format "
            f"{FORMAT}",
            fix="read it with the version of thanos-deploy that wrote it, or measure again",
        )
    return Records(
        tuple(
            _decoded(f"{path}, row {number}", value)
            for number, value in enumerate(document["rows"], 1)
        )
    )


def read_all(folder: Path) -> tuple[Records, ...]:
    """Read the documents of a folder in the order of their names; empty if it does not exist."""
    return tuple(read(path) for path in sorted(folder.glob("*.json")))


def joined(journals: Iterable[Path]) -> Records:
    """Read the rows of several journals, one journal after the other."""
    return Records(tuple(row for path in journals for row in read_journal(path)))


def _encoded(row: Row) -> Json:
    return {"kind": _NAMES[type(row)]} | encode(row)


def _row(where: str, line: str) -> Row:
    try:
        return _decoded(where, loads(line))
    except ValueError as error:
        raise _unreadable(where, str(error)) from error


def _decoded(where: str, value: object) -> Row:
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise _unreadable(where, f"not a row of a known kind: {str(value)[:80]}")
    kind = KINDS[value["kind"]]
    try:
        return decode(kind, {name: entry for name, entry in value.items() if name != "kind"})
    except ValueError as error:
        raise _unreadable(where, str(error)) from error


def _unreadable(where: object, why: str) -> InputError:
    return InputError(
        f"{where}: not readable GPU records ({why})",
        fix="make them again with `thanos-deploy gpu-check`, or restore the file",
    )
