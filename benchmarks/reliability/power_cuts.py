"""Repeat commands after simulated power cuts, in which unflushed writes may be lost or torn.

Each command runs once while its changes to the folder are logged (`disk_log`). From the log, the
folder is written as a power cut at a random moment may leave it. The repeated command has to finish
with the bytes of an undisturbed run, or to name the damaged file (exit code 3 or 7). In the latter
case it has to finish when `--overwrite` is added, unless the manifest itself is damaged.
"""

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.reliability import disk_log
from benchmarks.reliability.disk_log import Log
from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import WORKS

GOAL = 200
_CUTS = "power cuts"
_SAYS = (3, 7)

# Commands that write files in different ways; evaluations write one file at the end.
_NAMES = ("prune-fast", "shrink", "recover", "quantize", "export-packed", "prune-export")
_WORKS = tuple(work for work in WORKS if work.name in _NAMES)


@dataclass(frozen=True, slots=True)
class Restarted:
    """One command that was repeated after a power cut.

    Attributes:
        work: name of the command.
        call: index of the call before which the power was cut.
        damaged: number of files that lost their last writes.
        said: whether the command named a damaged file instead of finishing.
        fault: what went wrong; empty if nothing did.
    """

    work: str
    call: int
    damaged: int
    said: bool
    fault: str


def run(setting: Setting) -> Iterator[Slice]:
    """Cut the power of one command after the other."""
    before = setting.so_far(_CUTS)
    draw, end = random.Random(f"{setting.seed} {before}"), time.monotonic() + setting.seconds
    logs = [
        (one, recorded(one, setting.folder / f"log-{one.work.name}", setting.folder / "out"))
        for one in undisturbed(_WORKS, setting)
    ]
    turns = 0
    while turns < len(logs) or (time.monotonic() < end and before + turns < GOAL):
        alone, log = logs[(before + turns) % len(logs)]
        one = restart(alone, log, draw.randrange(len(log.moments)), draw, setting.folder / "cut")
        turns += 1
        yield Slice(
            [
                Figure(_CUTS, 1, least=GOAL),
                Figure("files that lost their last writes", one.damaged),
                Figure("repeated commands that named a damaged file", int(one.said)),
                Figure(
                    "repeated commands that failed otherwise, or wrote other bytes",
                    int(bool(one.fault)),
                    most=0,
                ),
                Figure(
                    "logged calls, before each of which the power can be cut",
                    sum(len(log.moments) for _, log in logs),
                    joined="last",
                ),
            ],
            [str(one)] if one.fault else [],
        )


def recorded(alone: Undisturbed, folder: Path, out: Path) -> Log:
    """Run a command while its changes to a folder are logged.

    Raises:
        RuntimeError: the command failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.rmtree(out, ignore_errors=True)
    alone.copy(out)
    command = alone.work.begin(alone.model, out, before=partial(disk_log.record, out, folder))
    _, errors = command.communicate()
    if command.returncode != 0 or (fault := alone.fault_in(out)):
        said = errors.decode(errors="replace")[-1000:] if command.returncode else fault
        raise RuntimeError(f"{alone.work.name} while it was recorded: {said}")
    return Log.read(folder)


def restart(alone: Undisturbed, log: Log, call: int, draw: random.Random, out: Path) -> Restarted:
    """Cut the power before a call, and repeat the command."""
    shutil.rmtree(out, ignore_errors=True)
    damaged = log.cut(call, draw, out)
    code, errors = _repeated(alone, out)
    said = code in _SAYS and str(out) in errors
    if said:
        code, errors = _repeated(alone, out, "--overwrite")
        if code == _SAYS[0] and str(out) in errors:  # the manifest itself is damaged
            return Restarted(alone.work.name, call, damaged, said, "")
    fault = f"exit code {code}: {errors[-500:]}" if code != 0 else alone.fault_in(out)
    return Restarted(alone.work.name, call, damaged, said, fault)


def _repeated(alone: Undisturbed, out: Path, *more: str) -> tuple[int | None, str]:
    command = alone.work.begin(alone.model, out, *more)
    _, errors = command.communicate()
    return command.returncode, errors.decode(errors="replace")


PART = Part(
    "power-cuts",
    "After a power cut at any moment, the repeated command writes the same bytes, or names the "
    "damaged file.",
    run,
)
