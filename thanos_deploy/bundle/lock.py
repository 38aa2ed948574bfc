"""Ensure that a folder has only one writer, also if several machines share the folder.

A writer holds two locks. The first is the system's lock (flock) on the file `.lock`. It ends with
the process, but a network file system may not support it, or only within one machine. So the writer
also creates the file `.lock-owner`, called the note, which identifies the process. The note is
created by a hard link, so it appears complete or not at all; a file system without links creates it
exclusively instead. Its modification time is renewed while the writer lives. A note is expired when

- its process was on this machine and has ended; or
- it was not renewed for `EXPIRY_SECONDS`, by the clock of the file system of the folder.

Standard library only.
"""

import _thread
import fcntl
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.files import sync
from thanos_deploy.errors import PlatformError

# Prefix of the names of both files, and of temporary files that killed processes leave.
LOCK = ".lock"

EXPIRY_SECONDS = 60.0
_BEAT_SECONDS = 5.0
_LOOK_SECONDS, _PAUSE_SECONDS = 0.2, 0.01

_FIX = "wait for it to finish, or give another folder with -o"


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that writes to a folder.

    Attributes:
        host: name of the machine, for messages.
        machine: identifier of the machine since it was booted, and of the container if there is
            one; see `_machine`.
        process: process id.
        started: start time of the process, in clock ticks since boot; 0 if unknown.
        token: random identifier of this claim.
    """

    host: str
    machine: str
    process: int
    started: int
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """Return this process as an owner, with a new token."""
        process = os.getpid()
        return cls(
            socket.gethostname(), _machine(), process, _started(process) or 0, uuid.uuid4().hex
        )

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended."""
        return self.machine == _machine() and _started(self.process) != self.started


class Lock:
    """The lock on a folder that this process writes to; a thread renews its note."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._folder, self._owner = folder, owner
        self._over = threading.Event()
        # If there is no memory for the thread, the note is not renewed, and another machine may
        # take over; `require` detects that. `threading.Thread.start` would wait for ever for a
        # thread that dies for lack of memory.
        with suppress(RuntimeError):
            _thread.start_new_thread(self._renew, ())

    def require(self) -> None:
        """Refuse to go on if another process has taken over the folder.

        Raises:
            PlatformError: another process took over, because the note of this one had expired.
        """
        if (owner := _read(_note(self._folder))) != self._owner:
            raise PlatformError(
                f"{self._folder}: {_who(owner)} has taken the folder over, because this "
                f"process did not respond for {EXPIRY_SECONDS:g} s",
                fix=_FIX,
            )

    def release(self) -> None:
        """Release the lock, so that other processes can write."""
        self._over.set()
        if _read(_note(self._folder)) == self._owner:
            _note(self._folder).unlink(missing_ok=True)

    def _renew(self) -> None:
        # Failures of the disk or a lack of memory may pass, so the thread goes on.
        while not self._is_over():
            with suppress(OSError, MemoryError):
                if _read(_note(self._folder)) == self._owner:
                    os.utime(_note(self._folder))

    def _is_over(self) -> bool:
        """Wait for one period, and return whether the lock was released meanwhile."""
        try:
            return self._over.wait(_BEAT_SECONDS)
        except (MemoryError, RuntimeError):  # `wait` allocates a lock
            time.sleep(_BEAT_SECONDS)
            return self._over.is_set()


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[Lock]:
    """Lock a folder for writing, inside the `with` block.

    Args:
        folder: an existing folder.
        wait: wait while another process has the lock, instead of raising an error.

    Raises:
        PlatformError: another process is writing to the folder.
    """
    with (folder / LOCK).open("a") as file:
        while True:
            taken = _flock(file.fileno())
            owner = Owner.here()
            other = _take(folder, owner) if taken else _read(_note(folder))
            if taken and other is None:
                break
            if not wait:
                raise PlatformError(f"{folder}: {_who(other)} is writing there", fix=_FIX)
            if taken:
                fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(_LOOK_SECONDS)
        lock = Lock(folder, owner)
        try:
            yield lock
        finally:
            lock.release()


def _flock(descriptor: int) -> bool:
    """Take the system's lock and return whether it is free.

    True also if the file system has no such locks; then the note alone decides.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP, or another error of a network file system
        pass
    return True


def _take(folder: Path, owner: Owner) -> Owner | None:
    """Create the note; return None, or the owner of a note that has not expired.

    Raises:
        OSError: the folder is not writable.
    """
    note = _note(folder)
    own = folder / f"{LOCK}-{owner.token}"
    try:
        own.write_text(json.dumps(encode(owner)))
        sync(own)  # otherwise a power cut could leave an empty note
        os.utime(own)  # makes a network file system use the time of its server
        _tidy(folder, own)
        while True:
            if _left(own, note):
                return None
            other = _read(note)
            if _counts(note, other, own):
                return other or _UNREADABLE
            _set_aside(folder, note, other, own)
    finally:
        own.unlink(missing_ok=True)


def _left(own: Path, note: Path) -> bool:
    """Create `note` with the content of `own`; return False if `note` exists already."""
    try:
        os.link(own, note)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            descriptor = os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(own.read_bytes())
    return True


def _counts(note: Path, owner: Owner | None, own: Path) -> bool:
    """Whether a note has not expired; its owner is None if the note cannot be read."""
    if owner is not None and owner.machine == _machine():
        return not owner.is_gone
    return _age(note, own) < EXPIRY_SECONDS


def _age(file: Path, own: Path) -> float:
    """Return the seconds since a file was modified; infinite if the file is gone.

    The current time is that of the file system, which sets the modification time of `own`.
    """
    os.utime(own)
    try:
        return own.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _tidy(folder: Path, own: Path) -> None:
    """Remove the temporary files of killed processes."""
    for path in folder.glob(f"{LOCK}-*"):
        if path not in (own, _note(folder)) and _age(path, own) > EXPIRY_SECONDS:
            path.unlink(missing_ok=True)


def _set_aside(folder: Path, note: Path, other: Owner | None, own: Path) -> None:
    """Remove an expired note, but not a new note that has replaced it meanwhile.

    Only one process at a time may do this, or two processes would remove each other's new notes.
    The file `.lock-aside` gives the right to do it.
    """
    right = folder / f"{LOCK}-aside"
    if not _left(own, right):
        if not _counts(right, _read(right), own):
            right.unlink(missing_ok=True)
        time.sleep(_PAUSE_SECONDS)
        return
    try:
        if _read(note) == other:
            note.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)


# Owner of a note that is damaged, or is still being written on a file system without links.
_UNREADABLE = Owner("", "", 0, 0, "")


def _note(folder: Path) -> Path:
    return folder / f"{LOCK}-owner"


def _read(note: Path) -> Owner | None:
    try:
        return decode(Owner, loads(note.read_bytes()))
    except (OSError, ValueError):
        return None


def _who(owner: Owner | None) -> str:
    """Describe another process for a message."""
    if owner is None or not owner.host:
        return "another process"
    return f"another process ({owner.process} on {owner.host})"


def _machine() -> str:
    """Return an identifier of this machine since boot; on Linux also of its PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _started(process: int) -> int | None:
    """Return the start time of a process, in clock ticks since boot; None if it does not exist.

    0 for an existing process whose start time the system does not tell.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # the process exists and belongs to another user
        pass
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
