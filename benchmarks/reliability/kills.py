"""Kill a command with `kill -9` at a random moment, and run the same command once more.

The second run has to end with exit code 0 and the bytes of an undisturbed run, in every file in
which two undisturbed runs agree; the other files contain times. A block whose entry was in the
journal at the moment of the kill must not be computed again.
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

# Latest moment of the kill, times the duration of the command: its last moments are hit too.
_BEYOND = 1.05
_LOOK_SECONDS = 0.005

GOAL = 500
_KILLS = "kills"
_ENDED = "commands that finished before the kill, not counted"


@dataclass(frozen=True, slots=True)
class Killed:
    """One command that was killed and repeated.

    Attributes:
        work: name of the command.
        after: seconds from the start of the command to the kill.
        ended: whether the command had ended before, so that nothing was killed.
        entries: number of blocks in the journal at the moment of the kill.
        again: number of these blocks that the second run computed again.
        fault: what went wrong; empty if nothing did.
    """

    work: str
    after: float
    ended: bool
    entries: int
    again: int
    fault: str


def run(setting: Setting) -> Iterator[Slice]:
    """Kill one command after the other, each at least once, until time or goal is reached."""
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
    """Return the entries of the journals, with the modification time of each."""
    found = set()
    for path in out.rglob("block-*.json"):
        with contextlib.suppress(FileNotFoundError):  # a journal is deleted when its work is done
            found.add((str(path.relative_to(out)), path.stat().st_mtime_ns))
    return found


@contextmanager
def _watched(out: Path) -> Iterator[set[tuple[str, int]]]:
    """Collect the entries that are in the journals at any time inside the block."""
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
