"""Run commands on disks of every size that is too small.

The output folder is on a tmpfs of a limited size, in steps of a page from zero to what the command
needs, so that each write that takes new space fails at one of the sizes. Each time the command has
to end with exit code 5 and without a traceback, and has to leave the model unchanged. After the
disk has grown, the repeated command has to finish with the bytes of an undisturbed run. Needs the
right to mount.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import WORKS

_FULL = 5
PAGE = 4096
_LARGE = 1 << 30

# Commands that write much in different ways; the one that runs every stage comes first.
_BY_NAME = {work.name: work for work in WORKS}
_WORKS = tuple(_BY_NAME[name] for name in ("prune-export", "prune-best", "shrink"))

_FAULTS = "runs with another exit code than 5, or with other bytes afterwards"


@dataclass(frozen=True, slots=True)
class Filled:
    """One command on a disk that was too small.

    Attributes:
        work: name of the command.
        size: size of the disk, in bytes.
        enough: whether the command finished on this disk.
        seconds: time of the attempt and of the repeated command.
        fault: what went wrong; empty if nothing did.
    """

    work: str
    size: int
    enough: bool
    seconds: float
    fault: str


def run(setting: Setting) -> Iterator[Slice]:
    """Run one command after the other on disks of all sizes that are too small.

    Sizes that are far from each other come first, and a later run continues where this one ends.
    """
    if not _can_mount():
        yield Slice([Figure("disks that could be mounted", 0, least=1)])
        return
    end, disk = time.monotonic() + setting.seconds, setting.folder / "disk"
    for alone in undisturbed(_WORKS, setting):
        name = alone.work.name
        pages = setting.so_far(_small(name))
        if not pages:
            looked = list(_until_enough(alone, disk))
            pages = min(one.size for one in looked if one.enough) // PAGE
            for one in looked:
                yield _found(one, pages, counts=False)
        for size in list(_spread(PAGE * pages))[setting.so_far(_tried(name)) :]:
            if time.monotonic() > end:
                return
            yield _found(fill(alone, disk, size), pages, counts=True)


def _found(one: Filled, pages: int, *, counts: bool) -> Slice:
    return Slice(
        [
            Figure(_small(one.work), pages, joined="last"),
            Figure(_tried(one.work), int(counts), least=pages),
            Figure(_FAULTS, int(bool(one.fault)), most=0),
        ],
        [str(one)] if one.fault else [],
    )


def _small(work: str) -> str:
    return f"{work}: disk sizes that are too small, in pages"


def _tried(work: str) -> str:
    return f"{work}: of these, tried"


def _until_enough(alone: Undisturbed, disk: Path) -> Iterator[Filled]:
    """Search for the smallest size that is enough by bisection, and yield every attempt.

    Raises:
        RuntimeError: the command fails on the largest disk too.
    """
    too_small, enough = -PAGE, PAGE
    while not (tried := fill(alone, disk, enough)).enough:
        yield tried
        if enough > _LARGE:
            raise RuntimeError(f"{alone.work.name} on a disk of {enough} bytes: {tried.fault}")
        too_small, enough = enough, 4 * enough
    yield tried
    while enough - too_small > PAGE:
        tried = fill(alone, disk, (too_small + enough) // 2 // PAGE * PAGE)
        yield tried
        if tried.enough:
            enough = tried.size
        else:
            too_small = tried.size


def _spread(needed: int) -> Iterator[int]:
    """Yield all multiples of a page below a size; the first ones are far from each other."""
    pages = needed // PAGE
    step, seen = 1 << max(pages - 1, 0).bit_length(), set()
    while step:
        for page in range(0, pages, step):
            if page not in seen:
                seen.add(page)
                yield page * PAGE
        step //= 2


def fill(alone: Undisturbed, disk: Path, size: int) -> Filled:
    """Run a command on a disk of a size, and repeat it after the disk has grown.

    Args:
        alone: the command.
        disk: folder to mount the disk at.
        size: bytes of the disk, in addition to those of the bundle that the command begins with.
    """
    begin, model = time.monotonic(), alone.model
    before = {path: path.read_bytes() for path in model.iterdir()}
    with mounted(disk, _used(alone.prepared) + size):
        out = alone.copy(disk / "out")
        command = alone.work.begin(model, out)
        _, errors = command.communicate()
        if command.returncode not in (0, _FULL):
            said = errors.decode(errors="replace")[-1000:]
            fault = f"exit code {command.returncode}: {said}"
        elif b"Traceback" in errors:
            fault = "a traceback"
        elif {path: path.read_bytes() for path in model.iterdir()} != before:
            fault = "the model was changed"
        else:
            _resize(disk, _LARGE)
            fault = alone.fault_of_repeating(out)
    took = time.monotonic() - begin
    return Filled(alone.work.name, size, command.returncode == 0, took, fault)


@contextmanager
def mounted(disk: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of a size at a folder."""
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", disk], check=True, capture_output=True)


def _can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)


def _used(folder: Path) -> int:
    """Return the bytes that a folder takes on a tmpfs, its subfolders included."""
    if not folder.exists():
        return PAGE
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*")) + PAGE


PART = Part(
    "disk-full",
    "If the disk is full at any write, the command ends with exit code 5, and nothing is lost.",
    run,
)
