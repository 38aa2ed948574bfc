"""Let two processes, or two machines, write to one folder.

The same command is started twice, the second time at a random moment while the first process runs.
One process has to finish with the bytes of an undisturbed run. The other one has to end with exit
code 4 within a second of opening the folder, or to find everything done if the first had finished.
Only pairs in which one process was refused count.

Network file systems are simulated by their effect on Python's `flock`, which fails or does nothing.
The second machine is simulated by another machine identity.
"""

import errno
import fcntl
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import WORKS
from tests.commands import Command
from thanos_deploy.bundle import lock

GOAL = 60
_TURNS = "pairs of processes"
_REFUSED = "of these, one was refused with exit code 4"
_IN_USE = 4
_MOST_SECONDS = 1.0

_WORKS = tuple(work for work in WORKS if work.name in ("prune-fast", "recover"))


def same_machine() -> None:
    """Change nothing: both processes are on this machine, whose locks work."""


def no_locks() -> None:
    """Simulate a network file system that refuses locks; both processes are on this machine."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse


def other_machine() -> None:
    """Simulate another machine, on a network file system whose locks work within one machine."""
    fcntl.flock = lambda file, operation: None
    lock._machine = lambda: "another machine"


# A name, and the function that each of the two processes calls first.
Kind = tuple[str, Callable[[], None], Callable[[], None]]
KINDS: tuple[Kind, ...] = (
    ("one machine", same_machine, same_machine),
    ("one machine, no locks", no_locks, no_locks),
    ("two machines, locks of no effect", same_machine, other_machine),
)


@dataclass(frozen=True, slots=True)
class Both:
    """How a pair of processes ended.

    Attributes:
        work: name of the command.
        kind: name of the simulated file system.
        seconds: time of the refused process from opening the folder to its end; 0 if none was
            refused.
        refused: whether a process was refused, and was seen to open the folder.
        fault: what went wrong; empty if nothing did.
    """

    work: str
    kind: str
    seconds: float
    refused: bool
    fault: str


def run(setting: Setting) -> Iterator[Slice]:
    """Run pairs of processes, with the kinds of file systems in turns."""
    before, refused = setting.so_far(_TURNS), setting.so_far(_REFUSED)
    draw, end = random.Random(f"{setting.seed} {before}"), time.monotonic() + setting.seconds
    every = list(undisturbed(_WORKS, setting))
    turns = 0
    while turns < len(KINDS) or (time.monotonic() < end and refused < GOAL):
        kind = KINDS[(before + turns) % len(KINDS)]
        one = both(draw.choice(every), setting.folder / "both", kind, draw)
        turns += 1
        refused += one.refused
        yield Slice(
            [
                Figure(_TURNS, 1),
                Figure(_REFUSED, int(one.refused), least=GOAL),
                Figure(
                    "pairs that ended otherwise, or wrote other bytes", int(bool(one.fault)), most=0
                ),
                Figure(
                    "longest time from opening the folder to the refusal, s",
                    one.seconds,
                    most=_MOST_SECONDS,
                    joined="most",
                ),
            ],
            [str(one)] if one.fault else [],
        )


def both(
    alone: Undisturbed,
    out: Path,
    kind: Kind,
    draw: random.Random,
) -> Both:
    """Start a command twice, and check how both processes end."""
    name, first, second = kind
    shutil.rmtree(out, ignore_errors=True)
    alone.copy(out)
    apart = draw.uniform(0, alone.seconds)
    commands = [alone.work.begin(alone.model, out, before=first)]
    time.sleep(apart)
    commands.append(alone.work.begin(alone.model, out, before=second))
    looks = _Looks(out, commands)
    ended = [command.communicate() for command in commands]
    codes = [command.returncode for command in commands]
    refused = codes.count(_IN_USE)
    fault = ""
    if codes.count(0) + refused != len(codes) or not codes.count(0):
        said = ended[codes.index(max(codes, key=str))][1].decode(errors="replace")
        fault = f"exit codes {codes}: {said[-500:]}"
    else:
        fault = alone.fault_in(out)
    seconds = looks.seconds()
    return Both(alone.work.name, name, seconds or 0.0, seconds is not None, fault)


class _Looks:
    """Watches when processes open the lock file of a folder, and when they end."""

    def __init__(self, out: Path, commands: list[Command]) -> None:
        self._lock, self._commands = str(out / lock.LOCK), commands
        self._found: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def seconds(self) -> float | None:
        """Return the seconds of the refused process from opening the lock file to its end.

        None if no process was refused, or if none was seen with the file open.
        """
        self._thread.join()
        return max(
            (
                self._ended[command.pid] - self._found[command.pid]
                for command in self._commands
                if command.returncode == _IN_USE and command.pid in self._found
            ),
            default=None,
        )

    def _watch(self) -> None:
        while len(self._ended) < len(self._commands):
            for command in self._commands:
                now = time.monotonic()
                if command.pid in self._ended:
                    continue
                if not _runs(command.pid):
                    self._ended[command.pid] = now
                elif command.pid not in self._found and self._lock in _open_files(command.pid):
                    self._found[command.pid] = now
            time.sleep(0.002)


def _runs(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _open_files(process: int) -> set[str]:
    found = set()
    try:
        for path in Path(f"/proc/{process}/fd").iterdir():
            found.add(str(path.readlink()))
    except OSError:
        pass
    return found


PART = Part(
    "two-processes",
    "If two processes write to one folder, on one machine or on two, one of them finishes, and the "
    "other is refused at once.",
    run,
)
