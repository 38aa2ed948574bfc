"""Steps that are measured one after the other, each in a process of its own.

A crash, a CUDA error that no later call recovers from, or a step that does not end loses that step
alone: its rows are on disk one by one, and the next step begins in a fresh process. The processes
are forked from one that has imported everything and touched no GPU, so a step begins at once.
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
from thanos_deploy.gpu_check.ending import Ending, measure
from thanos_deploy.progress import Announce, quietly

# A step is stopped when it has taken so many times what it usually takes.
_PATIENCE = 2.0

# What a step may take to end when it is asked to, before it is killed; in seconds.
_GRACE = 3.0

# How often a running step is looked at, in seconds.
_LOOK = 0.25

# What the driver may take to forget a process that has ended, in seconds.
_FORGET = 5.0

# Fraction of the last moments in which a kernel ran, while nothing of ours was there.
_MOST_BUSY = 0.05

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What a step is told.

    Attributes:
        device: "cuda"; "cpu" in a rehearsal.
        bundle: to check with; None if there is none.
        folder: an empty one for the step's files, which is removed after it.
    """

    device: str
    bundle: Path | None = None
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Step:
    """Something to measure.

    Attributes:
        name: on the command line and in files; "family:member" is also chosen by its family.
        seconds: that it usually takes.
        rows: measures, a row at a time; a function of a module, or a `partial` of one, because it
            is sent to another process.
        needs: keys of what can be missing, see `run`.
        always: done with any choice of steps, because no other can be judged without it.
    """

    name: str
    seconds: float
    rows: Callable[[Task], Iterable[Row]]
    needs: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a step cannot be done here, and what to do about it."""

    reason: str
    fix: str


def choose(
    steps: Sequence[Step], *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[Step]:
    """The steps that are asked for, in their own order.

    Args:
        steps: all of them.
        only: names or families to take, beside those that are always taken; empty for all.
        skip: names or families to leave out.

    Raises:
        UsageError: there is no such step, or none is left.
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
        raise UsageError("no step is left", fix="skip fewer steps")
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
    """Do the steps, and write what each measures and how it came out to a journal.

    Args:
        steps: in this order.
        task: what they are told; each gets a folder of its own.
        journal: where rows are appended.
        seconds: for all of them; a step that usually takes more than what is left is left out.
        missing: by key of `Step.needs`, what is not there.
        log: where what the steps print goes; None for this process's standard error.
        card: is read while steps run; None where nothing can be read.
        announce: told of every step, in seconds.

    Raises:
        UsageError: the time is too short for any step that could be done.
        KeyboardInterrupt: a signal asked for it; the running step is ended, and its row says so.
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
                f"left out: it takes {step.seconds:g} s, and {max(left, 0):.0f} s were left",
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
    kept = len(list(_own(journal, step)))
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
    """Do a step, and look at the card before, while and after."""
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
        ending = _heard(receiver)
    rows = [row for row in _own(journal, step) if not isinstance(row, StepRow)]
    if stopped:
        ending = Ending(
            "FAIL", f"stopped at its limit of {limit:.0f} s; {len(rows)} rows are kept",
            "run it alone with --only and more --seconds",
        )  # fmt: skip
    elif ending is None:
        ending = Ending(
            "FAIL",
            f"the process of this step {_death(process.exitcode)}; {len(rows)} rows are kept",
            "read the end of the log",
        )
    # An idle card rests its clock.
    clocks = [reading.clock_hz for reading in readings if reading.busy is None or reading.busy]
    return StepRow(
        step=step.name,
        outcome=ending.outcome,
        detail=ending.detail,
        fix=ending.fix,
        seconds=round(time.monotonic() - started, 3),
        clocks_hz=(min(clocks), max(clocks)) if clocks else None,
        throttle_reasons=tuple(
            dict.fromkeys(name for reading in readings for name in reading.throttle_reasons)
        ),
        other_processes=tuple(dict.fromkeys((*others, *_others(card)))),
    )


def _context() -> multiprocessing.context.ForkServerContext:
    """Where processes come from: a server that has imported what steps need, and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["thanos_deploy.gpu_check._preloaded"])
    return context


def _import_once() -> None:
    """Wait until the server of processes is ready, so that no step's time has its imports in it."""
    process = _context().Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    pass


def _child(step: Step, task: Task, journal: Path, log: Path | None, pipe: Connection) -> None:
    """The process of a step."""
    os.setpgid(0, 0)  # so that what it starts is stopped with it
    if sys.platform == "linux":  # and it is stopped with what started it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if log is not None:
        with log.open("ab") as file:
            file.write(f"\n--- {step.name}\n".encode())
            file.flush()
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    faulthandler.enable(file=2)
    ending = measure(lambda: step.rows(task), journal)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(ending)
    pipe.close()


def _own(journal: Path, step: Step) -> Iterator[Row]:
    """The rows since the last step ended."""
    rows = read_journal(journal)
    last = max((n for n, row in enumerate(rows, 1) if isinstance(row, StepRow)), default=0)
    yield from rows[last:]


def _stop(process: ForkServerProcess) -> None:
    """End a process and all that it started."""
    assert process.pid is not None
    for number, wait in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(ProcessLookupError):  # if it has no group of its own yet
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(wait)


def _heard(pipe: Connection) -> Ending | None:
    """What a process said at its end; None if it did not come to that."""
    try:
        if not pipe.poll():
            return None
        ending = pipe.recv()
    except (EOFError, OSError):
        return None
    finally:
        pipe.close()
    assert isinstance(ending, Ending)
    return ending


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _reading(card: nvml.Monitor | None) -> nvml.Reading | None:
    """How the card is; None where it does not say, which is no reason to lose a step."""
    try:
        return None if card is None else card.read()
    except Exception:  # of a library that need not be installed
        return None


def _others(card: nvml.Monitor | None) -> tuple[str, ...]:
    """What is on the card while nothing of ours is."""
    ends = time.monotonic() + _FORGET
    while (reading := _reading(card)) is not None:
        busy = reading.busy or 0.0
        if not reading.processes and busy <= _MOST_BUSY:
            return ()
        if time.monotonic() > ends:
            held = reading.memory_bytes
            return tuple(
                f"process {pid}" + (f", {held[pid] / 1e9:.1f} GB" if pid in held else "")
                for pid in reading.processes
            ) or (
                f"kernels of other processes ran {busy:.0%} of the time",
            )  # not told to a container
        time.sleep(_LOOK)
    return ()
