"""Run the steps of a measurement one after the other, each in a process of its own.

A crash, a CUDA error that no later call recovers from, or a step that hangs affects that step only:
its rows are on disk one by one, and the next step starts in a fresh process. A fork server starts
the processes. It has imported all libraries and has not touched the GPU, so a step starts at once.
"""

import ctypes
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from thanos_deploy.errors import UsageError
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu.records import Journal, read_journal
from thanos_deploy.gpu.rows import Row, StepRow
from thanos_deploy.gpu_check.outcome import StepOutcome, measure
from thanos_deploy.progress import Announce, quietly

# A step is stopped after this many times its usual duration.
_PATIENCE = 2.0

# Seconds that a step has to end after SIGTERM, before SIGKILL.
_GRACE = 3.0

# Seconds between two readings of the GPU while a step runs.
_LOOK = 0.25

# Seconds for which the driver may still list a process that has ended.
_FORGET = 5.0

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """The arguments of a step.

    Attributes:
        device: "cuda"; "cpu" in a rehearsal.
        bundle: the bundle to check; None if there is none.
        folder: empty folder for the step's files; it is removed after the step.
    """

    device: str
    bundle: Path | None = None
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a measurement.

    Attributes:
        name: name on the command line and in files; "family:member" can also be chosen by its
            family.
        seconds: usual duration.
        rows: measures and yields the rows; a function of a module, or a `partial` of one, because
            it is sent to another process.
        needs: what the step needs, as keys of the argument `missing` of `run`.
        always: run with every choice of steps, because no other step can be judged without it.
    """

    name: str
    seconds: float
    rows: Callable[[Task], Iterable[Row]]
    needs: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a step cannot run here, and what to do about it."""

    reason: str
    fix: str


def choose(
    steps: Sequence[Step], *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[Step]:
    """Return the chosen steps, in the order of `steps`.

    Args:
        steps: all steps.
        only: names or families to take, in addition to the steps with `always`; empty for all.
        skip: names or families to leave out.

    Raises:
        UsageError: a name is unknown, or no step is left but those with `always`.
    """
    known = dict.fromkeys(name for step in steps for name in sorted(_names(step)))
    for name in (*only, *skip):
        if name not in known:
            raise UsageError(
                f"there is no step {name!r}", fix=f"name one or more of {', '.join(known)}"
            )
    chosen = [
        step
        for step in steps
        if (not only or step.always or _names(step) & {*only}) and not _names(step) & {*skip}
    ]
    if all(step.always for step in chosen):
        raise UsageError(
            "--only and --skip leave no step to run", fix="choose more steps, or skip fewer"
        )
    return chosen


def _names(step: Step) -> set[str]:
    return {step.name, step.name.partition(":")[0]}


def run(
    steps: Sequence[Step],
    task: Task,
    journal: Path,
    *,
    seconds: float,
    missing: Mapping[str, Missing] | None = None,
    log: Path | None = None,
    card: nvml.Monitor | None = None,
    announce: Announce = quietly,
) -> None:
    """Run the steps, and append the rows and the outcome of each to a journal.

    Args:
        steps: the steps, in the order in which they run.
        task: arguments of all steps; each step gets a folder of its own.
        journal: file to which the rows are appended.
        seconds: time limit for all steps together. A step whose usual duration is longer than the
            time left is skipped.
        missing: what is missing on this machine, by key of `Step.needs`.
        log: file for what the steps print; None for this process's standard error.
        card: monitor of the GPU, read while steps run; None if the GPU cannot be monitored.
        announce: called with the name of every step; progress is counted in seconds.

    Raises:
        UsageError: the time limit is too short for any step that could run.
        KeyboardInterrupt: the user interrupted the run. The running step is ended and recorded as
            interrupted first.
    """
    missing = missing or {}
    possible = [
        step
        for step in steps
        if not step.always and not any(need in missing for need in step.needs)
    ]
    if possible and seconds < min(step.seconds for step in possible):
        least = min(possible, key=lambda step: step.seconds)
        raise UsageError(
            f"{seconds:g} seconds are too few for any step: {least.name}, the shortest, takes "
            f"{least.seconds:g}",
            fix=f"give --seconds {least.seconds:g} or more",
        )
    ends = time.monotonic() + seconds
    if possible:
        _import_once()
    for step in steps:
        lacking = next((missing[need] for need in step.needs if need in missing), None)
        left = ends - time.monotonic()
        if lacking is not None:
            row = StepRow(step.name, "SKIP", lacking.reason, lacking.fix)
        elif left < step.seconds:
            row = StepRow(
                step.name,
                "SKIP",
                f"skipped: it usually takes {step.seconds:g} s, and {max(left, 0):.0f} s were left",
                "give more --seconds, or --only this step",
            )
        else:
            try:
                row = _one(step, task, journal, left, log, card, announce)
            except KeyboardInterrupt:
                _write(journal, _interrupted(step, journal))
                raise
        _write(journal, row)


def _write(journal: Path, row: StepRow) -> None:
    with Journal(journal) as file:
        file.add(row)


def _interrupted(step: Step, journal: Path) -> StepRow:
    kept = len(list(_rows_of_current_step(journal)))
    return StepRow(
        step.name,
        "FAIL",
        f"interrupted, so this step and all later ones are incomplete; {kept} rows are kept",
        "run it again with --only",
    )


def _one(
    step: Step,
    task: Task,
    journal: Path,
    left: float,
    log: Path | None,
    card: nvml.Monitor | None,
    announce: Announce,
) -> StepRow:
    """Run one step in a process, and read the GPU before, during and after it."""
    limit = min(left, _PATIENCE * step.seconds)
    others = _others(card)
    started = time.monotonic()
    readings: list[nvml.Reading] = []
    with tempfile.TemporaryDirectory(prefix="step-", ignore_cleanup_errors=True) as folder:
        receiver, sender = _context().Pipe(duplex=False)
        arguments = (step, replace(task, folder=Path(folder)), journal, log, sender)
        process = _context().Process(target=_child, args=arguments, name=step.name)
        process.start()
        sender.close()
        progress = announce(step.name)
        progress(0, math.ceil(step.seconds))
        try:
            while process.is_alive() and (spent := time.monotonic() - started) < limit:
                if 1 <= spent < step.seconds:
                    progress(int(spent), math.ceil(step.seconds))
                process.join(_LOOK)
                if (reading := _reading(card)) is not None:
                    readings.append(reading)
            stopped = process.is_alive()
        finally:
            _stop(process)
        progress(math.ceil(step.seconds), math.ceil(step.seconds))
        ended = _received(receiver)
    rows = [row for row in _rows_of_current_step(journal) if not isinstance(row, StepRow)]
    if stopped:
        ended = StepOutcome(
            "FAIL", f"stopped at its limit of {limit:.0f} s; {len(rows)} rows are kept",
            "run it alone with --only and more --seconds",
        )  # fmt: skip
    elif ended is None:
        ended = StepOutcome(
            "FAIL",
            f"the process of this step {_death(process.exitcode)}; {len(rows)} rows are kept",
            "read the end of the log",
        )
    # Readings of an idle GPU do not count, because its clock is lowered.
    clocks = [reading.clock_hz for reading in readings if reading.busy is None or reading.busy]
    return StepRow(
        step=step.name,
        outcome=ended.outcome,
        detail=ended.detail,
        fix=ended.fix,
        seconds=round(time.monotonic() - started, 3),
        clocks_hz=(min(clocks), max(clocks)) if clocks else None,
        throttle_reasons=tuple(
            dict.fromkeys(name for reading in readings for name in reading.throttle_reasons)
        ),
        other_processes=tuple(dict.fromkeys((*others, *_others(card)))),
    )


def _context() -> multiprocessing.context.ForkServerContext:
    """Return the context of the fork server that has imported the modules of `_preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["thanos_deploy.gpu_check._preloaded"])
    return context


def _import_once() -> None:
    """Start the fork server and wait for its imports, so that no step's time includes them."""
    process = _context().Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    pass


def _child(step: Step, task: Task, journal: Path, log: Path | None, pipe: Connection) -> None:
    """Run a step; this is the main function of its process."""
    os.setpgid(0, 0)  # processes that the step starts are stopped with it
    if sys.platform == "linux":  # the step is killed when its parent, the fork server, ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if log is not None:
        with log.open("ab") as file:
            file.write(f"\n--- {step.name}\n".encode())
            file.flush()
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    faulthandler.enable(file=2)
    ended = measure(lambda: step.rows(task), journal)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(ended)
    pipe.close()


def _rows_of_current_step(journal: Path) -> Iterator[Row]:
    """Yield the rows after the last `StepRow`."""
    rows = read_journal(journal)
    last = max((n for n, row in enumerate(rows, 1) if isinstance(row, StepRow)), default=0)
    yield from rows[last:]


def _stop(process: ForkServerProcess) -> None:
    """End a process and all processes in its group."""
    assert process.pid is not None
    for number, wait in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(ProcessLookupError):  # for a process that has not made its group yet
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(wait)


def _received(pipe: Connection) -> StepOutcome | None:
    """Return the outcome that a process has sent; None if it ended without one."""
    try:
        if not pipe.poll():
            return None
        ended = pipe.recv()
    except (EOFError, OSError):
        return None
    finally:
        pipe.close()
    assert isinstance(ended, StepOutcome)
    return ended


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _reading(card: nvml.Monitor | None) -> nvml.Reading | None:
    """Read the state of the GPU; None on any error, since monitoring must not fail a step."""
    try:
        return None if card is None else card.read()
    except Exception:  # NVML's exceptions are in a package that need not be installed
        return None


def _others(card: nvml.Monitor | None) -> tuple[str, ...]:
    """Name what uses the GPU while no step runs; empty if nothing does.

    The driver may still list a process that has just ended, so this waits some seconds for the GPU
    to become free.
    """
    ends = time.monotonic() + _FORGET
    while (reading := _reading(card)) is not None:
        busy = reading.busy or 0.0
        if not reading.processes and busy <= nvml.MOST_BUSY:
            return ()
        if time.monotonic() > ends:
            held = reading.memory_bytes
            return tuple(
                f"process {pid}" + (f", {held[pid] / 1e9:.1f} GB" if pid in held else "")
                for pid in reading.processes
            ) or (
                f"kernels of other processes ran {busy:.0%} of the time",
            )  # a container may not see the other processes
        time.sleep(_LOOK)
    return ()
