"""A disk that is full at every size, from nothing to what a command needs.

The output folder is on a tmpfs of a limited size, in steps of a page: so every write that takes new
space is the one that fails, once. Each time the command has to end with exit code 5, to leave the
model as it was, and, after the disk has grown, to finish with the bytes of a run that was left alone.
Needs the right to mount.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.kills import Undisturbed, difference
from benchmarks.reliability.works import Work

_FULL = 5
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Filled:
    """One command on a disk that was too small.

    Attributes:
        size: of the disk, in bytes.
        enough: the command finished on it.
        fault: what was wrong; empty if nothing was.
    """

    work: str
    size: int
    enough: bool
    seconds: float
    fault: str


def fill(
    work: Work, model: Path, prepared: Path, disk: Path, size: int, alone: Undisturbed
) -> Filled:
    """Run a command on a disk of a size, and again when it has grown.

    Args:
        disk: a folder to mount the disk at.
        size: bytes of it beside those of the prepared folder.
    """
    begin = time.monotonic()
    before = {path: path.read_bytes() for path in model.iterdir()}
    with mounted(disk, _used(prepared) + size):
        out = disk / "out"
        if prepared.exists():
            shutil.copytree(prepared, out)
        command = work.begin(model, out)
        _, errors = command.communicate()
        fault, enough = "", command.returncode == 0
        if command.returncode not in (0, _FULL):
            said = errors.decode(errors="replace")[-1000:]
            fault = f"exit code {command.returncode}: {said}"
        elif b"Traceback" in errors:
            fault = "a traceback"
        elif {path: path.read_bytes() for path in model.iterdir()} != before:
            fault = "the model was changed"
        else:
            _resize(disk, 1 << 30)
            try:
                work.finish(model, out)
                fault = difference(out, alone)
            except RuntimeError as error:
                fault = f"after it has grown: {error}"
    return Filled(work.name, size, enough, time.monotonic() - begin, fault)


@contextmanager
def mounted(disk: Path, size: int) -> Iterator[None]:
    """A tmpfs of a size at a folder."""
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


def can_mount() -> bool:
    """This process may mount."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)


def _used(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs, its folders included."""
    if not folder.exists():
        return PAGE
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*")) + PAGE
