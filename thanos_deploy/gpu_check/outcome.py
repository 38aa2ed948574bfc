"""Measure the rows of a step and determine its outcome, in the process of that step."""

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.check import Outcome
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.gpu.records import Journal
from thanos_deploy.gpu.rows import CheckRow, KernelRow, Row


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome that the process of a step reports when it ends on its own; see `StepRow`."""

    outcome: Outcome
    detail: str
    fix: str = ""


def measure(measured: Callable[[], Iterable[Row]], journal: Path) -> StepOutcome:
    """Write the rows of a step as they are measured, and return its outcome.

    Args:
        measured: measures and yields the rows; an exception from it becomes the outcome.
        journal: file to which the rows are appended.
    """
    rows: list[Row] = []
    try:
        with Journal(journal) as file:
            for row in measured():
                file.add(row)
                rows.append(row)
    except PlatformError as error:
        return StepOutcome("FAIL" if rows else "SKIP", error.message, error.fix)
    except DeployError as error:
        return StepOutcome("FAIL", error.message, error.fix)
    except Exception as error:  # any exception of a driver or library is a result
        traceback.print_exc()
        kept = f"; {len(rows)} rows are kept" if rows else ""
        first = (str(error) or "no message").splitlines()[0]
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
            return StepOutcome(
                "FAIL",
                f"out of memory: {first}{kept}",
                "use a GPU with more memory, or one that no other process uses",
            )
        return StepOutcome("FAIL", f"{type(error).__name__}: {first}{kept}", "read the log")
    return _outcome_of(rows)


def _outcome_of(rows: Sequence[Row]) -> StepOutcome:
    """Return the outcome of a step that ran to its end, from the outcomes of its rows."""
    judged = [row for row in rows if isinstance(row, CheckRow | KernelRow)]
    failed = [row for row in judged if row.outcome == "FAIL"]
    measured = [row for row in rows if _is_measured(row)]
    if failed:
        first = failed[0]
        what = (
            f"{first.name}: {first.detail}"
            if isinstance(first, CheckRow)
            else f"{first.kernel}, {first.dtype}, {first.outputs} x {first.inputs}, {first.tokens} "
            f"tokens: error {first.error:.1e}, limit {first.limit:.1e}"
        )
        fix = (
            first.fix
            if isinstance(first, CheckRow)
            else "report this with the name of the GPU and the versions of the packages"
        )
        return StepOutcome(
            "FAIL", f"{len(failed)} of {len(rows)} checks failed; the first: {what}", fix
        )
    if not measured:
        return StepOutcome("SKIP", _reason(rows))
    skipped = len(rows) - len(measured)
    more = f", {skipped} not measured ({_reason(rows)})" if skipped else ""
    return StepOutcome("PASS", f"{len(measured)} rows{more}")


def _is_measured(row: Row) -> bool:
    if isinstance(row, CheckRow):
        return row.outcome != "SKIP"
    return getattr(row, "reason", None) is None


def _reason(rows: Sequence[Row]) -> str:
    """Return the reason of the first row that was not measured."""
    for row in rows:
        if isinstance(row, CheckRow) and row.outcome == "SKIP":
            return f"{row.name}: {row.detail}"
        if reason := getattr(row, "reason", None):
            return str(reason)
    return "nothing was measured"
