"""`kill -9` at a random moment of a command, and then the same command once more.

The second run has to end with exit code 0 and the bytes of a run that was left alone, in every file
that two such runs agree on; the rest has times in it. No block whose entry was in the journal when
the first run was killed may be done again.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import WORKS

# A little longer than the command takes, so that its last moments are hit too.
_BEYOND = 1.05
_LOOK_SECONDS = 0.005

GOAL = 500
_KILLS = "kills"
_ENDED = "commands that finished before the kill, not counted"


@dataclass(frozen=True, slots=True)
class Killed:
    """One command that was killed and repeated.

    Attributes:
        after: seconds from its start to the end of it.
        ended: it had ended before, so that nothing was killed.
        entries: blocks that were in a journal when it was killed.
        again: of these, computed again by the second run.
        fault: what was wrong; empty if nothing was.
    """

    work: str
    after: float
    ended: bool
    entries: int
    again: int
    fault: str


def run(setting: Setting) -> Iterator[Slice]:
    """Kill one command after the other, as often as there is time for, and each at least once."""
    kills = setting.so_far(_KILLS)
    before = kills + setting.so_far(_ENDED)
    draw, end = random.Random(f"{setting.seed} {before}"), time.monotonic() + setting.seconds
    every = list(undisturbed(WORKS, setting))
    turns = 0
    while turns < len(every) or (time.monotonic() < end and kills < GOAL):
        one = kill(every[(before + turns) % len(every)], setting.folder / "killed", draw)
        turns += 1
        kills += not one.ended
        yield Slice(
            [
                Figure("different commands", len(WORKS), joined="last"),
                Figure(_KILLS, int(not one.ended), least=GOAL),
                Figure(_ENDED, int(one.ended)),
                Figure(
                    "repeated runs that failed, or wrote other bytes",
                    int(bool(one.fault)),
                    most=0,
                ),
                Figure("blocks in the journal at the moment of the kill", one.entries),
                Figure("of these, computed again", one.again, most=0),
            ],
            [str(one)] if one.fault else [],
        )


def kill(alone: Undisturbed, out: Path, draw: random.Random) -> Killed:
    """Kill a command once, and repeat it."""
    alone.copy(out)
    after = draw.uniform(0, alone.seconds * _BEYOND)
    command = alone.work.begin(alone.model, out)
    command.wait(after)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGKILL)
    _, errors = command.communicate()
    if command.returncode not in (0, -signal.SIGKILL):
        said = errors.decode(errors="replace")[-500:]
        fault = f"exit code {command.returncode} before it was killed: {said}"
        return Killed(alone.work.name, after, ended=True, entries=0, again=0, fault=fault)
    before = _entries(out)
    with _watched(out) as seen:
        fault = alone.fault_of_repeating(out)
    again = {name for name, _ in seen - before} & {name for name, _ in before}
    return Killed(
        work=alone.work.name,
        after=after,
        ended=command.returncode == 0,
        entries=len(before),
        again=len(again),
        fault=fault or ("blocks were done again" if again else ""),
    )


def _entries(out: Path) -> set[tuple[str, int]]:
    """The entries of journals, with the time of each."""
    found = set()
    for path in out.rglob("block-*.json"):
        with contextlib.suppress(FileNotFoundError):  # a journal goes when its work is done
            found.add((str(path.relative_to(out)), path.stat().st_mtime_ns))
    return found


@contextmanager
def _watched(out: Path) -> Iterator[set[tuple[str, int]]]:
    """The entries that are in the journals at any time from now on."""
    seen: set[tuple[str, int]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                seen.update(_entries(out))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


PART = Part(
    "kills",
    "A command that is killed at any moment continues when it is repeated, and writes the same "
    "bytes.",
    run,
)
