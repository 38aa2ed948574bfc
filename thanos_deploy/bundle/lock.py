"""One writer of a folder, on one machine or on several that share it. Standard library only.

Two locks are held. The system's, on the file `.lock`, is gone with its process, but a network file
system may not have it, or keep it to one machine. So the writer also leaves a note of who it is,
`.lock-owner`, which is there whole or not at all because it comes by a hard link, or by creating it
where links are missing. Its time is renewed while its writer lives. A note counts for nothing when

- its process is on this machine and is gone; or
- it has not been renewed for `EXPIRY_SECONDS`, by the clock of the disk that the folder is on.
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

# What the names of both files, and of those that are left of them, begin with.
LOCK = ".lock"

EXPIRY_SECONDS = 60.0
_BEAT_SECONDS = 5.0
_LOOK_SECONDS, _PAUSE_SECONDS = 0.2, 0.01

_FIX = "wait for it to finish, or give another folder with -o"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who writes.

    Attributes:
        host: name of the machine, for people.
        machine: what no other machine has, nor this one after it was started again; of a container,
            what no other one has.
        process: number of the process.
        started: when the process was, in ticks since the machine was.
        token: of this one claim.
    """

    host: str
    machine: str
    process: int
    started: int
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """This process, with a token of its own."""
        process = os.getpid()
        return cls(
            socket.gethostname(), _machine(), process, _started(process) or 0, uuid.uuid4().hex
        )

    @property
    def is_gone(self) -> bool:
        """Its process is known to have ended."""
        return self.machine == _machine() and _started(self.process) != self.started


class Lock:
    """A folder that this process writes to."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._folder, self._owner = folder, owner
        self._over = threading.Event()
        # Without memory for it the note is not renewed, and another machine may take over, which
        # `require` sees. `threading.Thread.start` would wait for ever for a thread that dies so.
        with suppress(RuntimeError):
            _thread.start_new_thread(self._renew, ())

    def require(self) -> None:
        """Refuse to go on where another process has taken the folder over.

        Raises:
            PlatformError: this process was stopped for so long that another one did.
        """
        if (owner := _read(_note(self._folder))) != self._owner:
            raise PlatformError(
                f"{self._folder}: {_who(owner)} has taken the folder over, because this "
                f"process did not respond for {EXPIRY_SECONDS:g} s",
                fix=_FIX,
            )

    def release(self) -> None:
        """Let others write."""
        self._over.set()
        if _read(_note(self._folder)) == self._owner:
            _note(self._folder).unlink(missing_ok=True)

    def _renew(self) -> None:
        # A disk or memory that comes back in time is no reason to end.
        while not self._is_over():
            with suppress(OSError, MemoryError):
                if _read(_note(self._folder)) == self._owner:
                    os.utime(_note(self._folder))

    def _is_over(self) -> bool:
        """Wait until the next time; whether the lock was released meanwhile."""
        try:
            return self._over.wait(_BEAT_SECONDS)
        except (MemoryError, RuntimeError):  # `wait` allocates what it waits for
            time.sleep(_BEAT_SECONDS)
            return self._over.is_set()


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[Lock]:
    """Be the one that writes to a folder.

    Args:
        folder: one that is there.
        wait: wait for another process instead of refusing.

    Raises:
        PlatformError: another process writes there.
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
    """Take the system's lock; where there is none, the note alone decides."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP, or whatever else a network file system says
        pass
    return True


def _take(folder: Path, owner: Owner) -> Owner | None:
    """Leave a note; whose is there instead, or None when it is done.

    Raises:
        OSError: nothing can be written there.
    """
    note = _note(folder)
    own = folder / f"{LOCK}-{owner.token}"
    try:
        own.write_text(json.dumps(encode(owner)))
        sync(own)  # or a power cut leaves a note that says nothing
        os.utime(own)  # a network file system then takes the time of its server
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
    """Leave the note, unless one is there."""
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
    """Whoever left the note may still be writing; None for one that cannot be read."""
    if owner is not None and owner.machine == _machine():
        return not owner.is_gone
    return _age(note, own) < EXPIRY_SECONDS


def _age(file: Path, own: Path) -> float:
    """Seconds since a file was written, by the clock of the disk; endless where it is gone."""
    os.utime(own)
    try:
        return own.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _tidy(folder: Path, own: Path) -> None:
    """Remove what killed processes left."""
    for path in folder.glob(f"{LOCK}-*"):
        if path not in (own, _note(folder)) and _age(path, own) > EXPIRY_SECONDS:
            path.unlink(missing_ok=True)


def _set_aside(folder: Path, note: Path, other: Owner | None, own: Path) -> None:
    """Remove a note that counts for nothing, and no other one that has come in its place.

    Only one process at a time may do that, or two would remove each other's.
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


# A note that somebody is writing where links are missing, or that is damaged.
_UNREADABLE = Owner("", "", 0, 0, "")


def _note(folder: Path) -> Path:
    return folder / f"{LOCK}-owner"


def _read(note: Path) -> Owner | None:
    try:
        return decode(Owner, loads(note.read_bytes()))
    except (OSError, ValueError):
        return None


def _who(owner: Owner | None) -> str:
    """Another process, for a message."""
    if owner is None or not owner.host:
        return "another process"
    return f"another process ({owner.process} on {owner.host})"


def _machine() -> str:
    """What this machine has alone, until it is started again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _started(process: int) -> int | None:
    """When a process of this machine was started, in ticks; None if there is none.

    Where the system does not say, 0 for one that is there.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        pass
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
