"""`kill -9` at a random moment of a command, and then the same command once more.

The second run has to end with exit code 0 and the bytes of a run that was left alone, in every file
that two such runs agree on; the rest has times in it. No block whose entry was in the journal when
the first run was killed may be done again.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting
from benchmarks.reliability.works import WORKS, Work, small_model
from thanos_deploy.bundle.manifest import Bundle

# A little longer than the command takes, so that its last moments are hit too.
_BEYOND = 1.05
_LOOK_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What a command makes of the prepared folder.

    Attributes:
        seconds: that it takes.
        files: SHA-256 by name, of those that are the same each time.
    """

    seconds: float
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Killed:
    """One command that was killed and repeated.

    Attributes:
        after: seconds from its start to the end of it.
        finished: it had ended before.
        entries: blocks that were in a journal when it was killed.
        again: of these, done again by the second run.
        fault: what was wrong; empty if nothing was.
    """

    work: str
    after: float
    finished: bool
    entries: int
    again: int
    fault: str


def run(setting: Setting) -> list[Figure]:
    """Kill one command after the other, as often as there is time for, and each at least once."""
    os.environ["THANOS_DEPLOY_CACHE"] = str(setting.folder / "cache")
    model = small_model(setting.folder / "model")
    draw, end = random.Random(setting.seed), time.monotonic() + setting.seconds
    ready = []
    for work in WORKS:
        prepared = setting.folder / f"prepared-{work.name}"
        work.prepare(model, prepared)
        ready.append((work, prepared, undisturbed(work, model, prepared, setting.folder)))
    killed: list[Killed] = []
    while not killed or time.monotonic() < end:
        for work, prepared, alone in ready:
            killed.append(kill(work, model, prepared, setting.folder, alone, draw))
            if killed[-1].fault:
                print(killed[-1], file=sys.stderr, flush=True)
    faults = sum(bool(one.fault) for one in killed)
    return [
        Figure("commands, each killed in turn", len(WORKS)),
        Figure("kills", len(killed)),
        Figure("kills of commands that had ended", sum(one.finished for one in killed)),
        Figure("second runs that ended otherwise, or with other bytes", faults, "0", faults == 0),
        Figure("blocks in a journal when the first run was killed", sum(k.entries for k in killed)),
        Figure(
            "of these, done again",
            sum(k.again for k in killed),
            "0",
            not any(k.again for k in killed),
        ),
    ]


def undisturbed(work: Work, model: Path, prepared: Path, folder: Path) -> Undisturbed:
    """Run a command twice."""
    took, found = [], []
    for number in range(2):
        out = _copy(prepared, folder / f"alone-{number}")
        begin = time.monotonic()
        work.finish(model, out)
        took.append(time.monotonic() - begin)
        found.append(_hashes(out))
        shutil.rmtree(out)
    one, other = found
    same = {name: digest for name, digest in one.items() if other.get(name) == digest}
    weights = [name for name in one if name.endswith((".safetensors", ".onnx", ".onnx.data"))]
    if strange := sorted(set(weights) - set(same)):
        raise RuntimeError(f"{work.name}: two runs alone differ in {', '.join(strange)}")
    return Undisturbed(min(took), same)


def kill(
    work: Work, model: Path, prepared: Path, folder: Path, alone: Undisturbed, draw: random.Random
) -> Killed:
    """Kill a command once, and repeat it."""
    out = _copy(prepared, folder / "killed")
    after = draw.uniform(0, alone.seconds * _BEYOND)
    command = work.begin(model, out)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGKILL)
    command.communicate()
    finished = command.returncode == 0
    before = _entries(out)
    with _watched(out) as seen:
        try:
            work.finish(model, out)
            fault = difference(out, alone)
        except RuntimeError as error:
            fault = str(error)
    again = {name for name, _ in seen - before} & {name for name, _ in before}
    shutil.rmtree(out)
    return Killed(
        work.name, after, finished, len(before), len(again),
        fault or ("blocks were done again" if again else ""),
    )  # fmt: skip


def difference(out: Path, alone: Undisturbed) -> str:
    """In what a bundle differs from those of undisturbed runs; empty if in nothing."""
    Bundle.open(out).verify()
    found = _hashes(out)
    wrong = sorted(name for name, digest in alone.files.items() if found.get(name) != digest)
    return f"other bytes in {', '.join(wrong)}" if wrong else ""


def _copy(prepared: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    if prepared.exists():
        shutil.copytree(prepared, out)
    return out


def _hashes(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


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
    "A command that is killed at any moment goes on when it is repeated, to the same bytes.",
    run,
)
