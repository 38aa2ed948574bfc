"""What was measured on a GPU: the rows, one journal while they are measured, one document after.

    journal   JSON lines: a row is on disk before the next one is measured
    document  one JSON value, as benchmarks/results/gpu/*.json and `gpu-check` have it

Everything that prints or uses such a figure reads it from here. Standard library only.
"""

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from thanos_deploy.check import Outcome
from thanos_deploy.errors import InputError

FORMAT = 1

Status = Literal["VALID", "INVALID", "REHEARSAL"]


@dataclass(frozen=True, slots=True)
class Card:
    """What was measured on.

    Attributes:
        name: of the GPU; of a rehearsal, the processor.
        device: "cuda"; "cpu" for a rehearsal, of which no time means anything.
        capability: compute capability, major and minor; (0, 0) for a rehearsal.
        memory_bytes: all of its memory.
        driver: version of the driver.
        driver_cuda: the newest CUDA that the driver takes.
        torch, torch_cuda, triton, transformers, python: versions; None for what is not there.
        power_limit_watts: None where the card does not say.
        most_clock_hz: the highest clock of the multiprocessors; None likewise.
        date: of the run, in UTC, such as "2026-11-30".
        command: that measures the same again.
    """

    name: str
    device: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str | None
    driver_cuda: str | None
    torch: str
    torch_cuda: str | None
    triton: str | None
    transformers: str | None
    python: str
    power_limit_watts: float | None
    most_clock_hz: float | None
    date: str
    command: str


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the card can do at best, measured.

    Attributes:
        copy_bytes_per_second: read and written, of a copy that no cache holds.
        gemm_dtype, gemm_size: rows and columns of the square matrices that were multiplied.
        gemm_flops_per_second: of that product.
    """

    copy_bytes_per_second: float
    gemm_dtype: str
    gemm_size: int
    gemm_flops_per_second: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """How a step came out, and how the card was while it ran.

    Attributes:
        step: its name.
        outcome: PASS, FAIL, or SKIP for what could not be done here.
        detail: what was seen, or why it did not go through.
        fix: what to do next; empty where nothing is wrong.
        seconds: wall time, the start of its process included.
        clocks_hz: lowest and highest seen of the multiprocessors; None where nobody says.
        throttle_reasons: why the clock was lower than it could be.
        other_processes: what else used the GPU, one text each.
    """

    step: str
    outcome: Outcome
    detail: str
    fix: str = ""
    seconds: float = 0.0
    clocks_hz: tuple[float, float] | None = None
    throttle_reasons: tuple[str, ...] = ()
    other_processes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One thing that was checked inside a step.

    Attributes:
        step: that checked it.
        name: what was checked.
        outcome, detail, fix: as of `StepRow`.
    """

    step: str
    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel's product beside the same one in float64.

    Attributes:
        kernel: a key of `runtime.kernels.linears.MAKERS`, or "dense".
        dtype: "fp16" or "bf16".
        outputs, inputs: of the weight.
        tokens: rows of x.
        error: ||out - ref|| / ||ref||, Frobenius; None where there is no product.
        limit: what it must not exceed.
        reason: why there is no product; None where there is one.
    """

    kernel: str
    dtype: str
    outputs: int
    inputs: int
    tokens: int
    error: float | None
    limit: float
    reason: str | None = None

    @property
    def outcome(self) -> Outcome:
        """PASS, FAIL, or SKIP for a product that the kernel does not take."""
        if self.error is None:
            return "SKIP"
        return "PASS" if self.error <= self.limit else "FAIL"  # NaN fails


@dataclass(frozen=True, slots=True)
class GemmRow:
    """y = x W^T with a 2:4 weight W, timed.

    Attributes:
        kernel, dtype, outputs, inputs, tokens: as of `KernelRow`.
        seconds: of one product, each sample; None where it was not timed.
        error: as of `KernelRow`.
        reason: why it was not timed.
    """

    kernel: str
    dtype: str
    outputs: int
    inputs: int
    tokens: int
    seconds: tuple[float, ...] | None
    error: float | None
    reason: str | None = None

    @property
    def median(self) -> float:
        """Seconds; NaN where it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One pass of a whole model, timed.

    Attributes:
        model: "dense", "2:4", "structured" or "structured, 2:4".
        engine: backend and variant, such as "torch:sparse".
        dtype: "fp16" or "bf16".
        blocks: how many the model has.
        parameters: of the whole model, zeros included.
        phase: "prefill" or "decode".
        batch: sequences.
        tokens: of each prompt in prefill; before the timed steps in decode.
        seconds: of one prefill, or of one decode step; None where it was not timed.
        memory_bytes: the most that the process held on the GPU; None where nobody says.
        reason: why it was not timed.
    """

    model: str
    engine: str
    dtype: str
    blocks: int
    parameters: int
    phase: Literal["prefill", "decode"]
    batch: int
    tokens: int
    seconds: tuple[float, ...] | None
    memory_bytes: int | None
    reason: str | None = None

    @property
    def median(self) -> float:
        """Seconds; NaN where it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class PruningRow:
    """One layer, pruned.

    Attributes:
        method: such as "thanos".
        preset: whose options were used, such as "fast".
        pattern: such as "2:4".
        outputs, inputs: of the layer.
        seconds: of the solver alone; None where it failed.
        loss: the output error that is left, relative to that of an empty layer.
        reason: why it failed.
    """

    method: str
    preset: str
    pattern: str
    outputs: int
    inputs: int
    seconds: float | None
    loss: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class HessianRow:
    """The statistics of a layer's inputs, summed up.

    Attributes:
        inputs: columns of the layer.
        tokens: that were added.
        seconds: in all.
    """

    inputs: int
    tokens: int
    seconds: float


Row = Card | Peaks | StepRow | CheckRow | KernelRow | GemmRow | ModelRow | PruningRow | HessianRow

# How each kind of row is named in files.
KINDS: Mapping[str, type[Row]] = {
    "card": Card,
    "peaks": Peaks,
    "step": StepRow,
    "check": CheckRow,
    "kernel": KernelRow,
    "gemm": GemmRow,
    "model": ModelRow,
    "pruning": PruningRow,
    "hessian": HessianRow,
}
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
        """What was measured on; None where the run did not come so far."""
        return next(iter(self.of(Card)), None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the times are not to be trusted; empty if nothing speaks against them."""
        found = dict[str, None]()
        if self.card is None:
            found["nobody recorded what was measured on"] = None
        elif self.card.device != "cuda":
            found["a rehearsal on a CPU: no time in it means anything"] = None
        for step in self.of(StepRow):
            for process in step.other_processes:
                found[f"another process used the GPU: {process}"] = None
            if names := ", ".join(step.throttle_reasons):
                found[f"the GPU lowered its clock in step {step.step}: {names}"] = None
        return tuple(found)

    @property
    def status(self) -> Status:
        """VALID, or INVALID for times that are not to be trusted, or REHEARSAL."""
        if self.card is not None and self.card.device != "cuda":
            return "REHEARSAL"
        return "INVALID" if self.reasons else "VALID"


class Journal:
    """Rows as they come: each is on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        """Append to a file, which need not be there.

        A line that another writer was killed in is cut off first.
        """
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write a row."""
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
    """The rows of a journal; none if it is not there.

    Its writer may have been killed, so a last line that is not whole is left out.

    Raises:
        InputError: another line cannot be understood.
    """
    if not path.exists():
        return ()
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    assert "\n" not in torn
    return tuple(_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1))


def write(path: Path, records: Records) -> None:
    """Write the document of a run, in one step."""
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
        InputError: it cannot be read, or is of a format that this version does not know.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise _unreadable(path, "there are no rows in it")
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
    """The documents of a folder, by name; none if it is not there."""
    return tuple(read(path) for path in sorted(folder.glob("*.json")))


def joined(journals: Iterable[Path]) -> Records:
    """The rows of several journals, one after the other."""
    return Records(tuple(row for path in journals for row in read_journal(path)))


def _encoded(row: Row) -> dict[str, Any]:
    return {"kind": _NAMES[type(row)]} | {
        field: _json(value) for field, value in asdict(row).items()
    }


def _json(value: object) -> object:
    """A field as JSON; numbers that JSON does not have become their names."""
    if isinstance(value, tuple):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _row(where: str, line: str) -> Row:
    try:
        return _decoded(where, json.loads(line))
    except ValueError as error:
        raise _unreadable(where, str(error)) from error


def _decoded(where: str, value: object) -> Row:
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise _unreadable(where, f"not a row of a known kind: {str(value)[:80]}")
    kind = KINDS[value["kind"]]
    hints = get_type_hints(kind)
    given = {name: entry for name, entry in value.items() if name != "kind"}
    if unknown := given.keys() - hints.keys():
        raise _unreadable(where, f"unknown field {sorted(unknown)[0]!r}")
    try:
        return kind(**{name: _as(hints[name], entry, name) for name, entry in given.items()})
    except TypeError as error:
        raise _unreadable(where, str(error)) from error


def _as(hint: Any, value: object, name: str) -> Any:
    """A value of JSON as the type of a field.

    Raises:
        TypeError: it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (other,) = (argument for argument in arguments if argument is not type(None))
        return _as(other, value, name)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = list(_kinds(arguments, len(value)))
        if len(kinds) == len(value):
            return tuple(_as(kind, entry, name) for kind, entry in zip(kinds, value, strict=True))
    if hint is float and (value in _NOT_FINITE or _is_number(value)):
        return float(value)  # type: ignore[arg-type]
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise TypeError(f"field {name!r} is {str(value)[:40]!r}")


_NOT_FINITE = ("nan", "inf", "-inf")


def _kinds(arguments: tuple[Any, ...], length: int) -> Iterator[Any]:
    """The types of a tuple's entries."""
    if arguments[1:] == (Ellipsis,):
        yield from arguments[:1] * length
    else:
        yield from arguments


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unreadable(where: object, why: str) -> InputError:
    return InputError(
        f"{where}: not readable GPU records ({why})",
        fix="make them again with `thanos-deploy gpu-check`, or restore the file",
    )
