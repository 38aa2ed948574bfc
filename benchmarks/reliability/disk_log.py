"""Log what a process does to a folder, and draw what a power cut leaves of the folder.

`record` runs in the process. Before every call that changes names or flushes, it notes the names in
the folder and the content of every file. Writes themselves need not be logged, because data that is
not flushed may survive a power cut as a whole, in part, or not at all. `Log.cut` draws a state that
the power cut may leave:

- A file has the content of its last flush. If it was changed since, it has that content, the new
  content, a prefix of it, nothing, or a mix of new, old and zero pages.
- A folder has the names of its last flush or of any moment after it. On most file systems names
  become durable in the order in which they were made; on some, in each folder independently.
"""

import hashlib
import itertools
import json
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PAGE = 4096

_CALLS = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate")

_MOMENTS = "moments"

Names = dict[int, dict[str, int]]  # maps a folder's inode to its names and their inodes


@dataclass(frozen=True, slots=True)
class Moment:
    """State of the folder before a call.

    Files and folders are identified by numbers that stand for inodes; the folder itself is 0.

    Attributes:
        call: name of the call, such as "fsync".
        flushed: number of what the call flushes; 0 for nothing, or for the folder itself.
        names: maps the number of a folder to its names and their numbers.
        contents: maps the number of a file to the SHA-256 of its content, which the log's folder
            holds.
    """

    call: str
    flushed: int
    names: Names
    contents: dict[int, str]


@dataclass(frozen=True, slots=True)
class Log:
    """Log of everything that a process did to a folder.

    Attributes:
        folder: folder with the contents of files.
        moments: states of the folder, in order.
    """

    folder: Path
    moments: list[Moment]

    @classmethod
    def read(cls, folder: Path) -> "Log":
        """Read the log that `record` wrote."""
        numbers: dict[int, int] = {}
        fresh = itertools.count(1)
        moments = []
        for line in (folder / _MOMENTS).read_text(encoding="utf-8").splitlines():
            moment = _moment(json.loads(line))
            there = {*moment.names, *moment.contents}
            # The inode of a deleted file may be used for another file later.
            numbers = {inode: number for inode, number in numbers.items() if inode in there}
            numbers[0] = 0
            for inode in sorted(there - set(numbers)):
                numbers[inode] = next(fresh)
            moments.append(_renumbered(moment, numbers))
        return cls(folder, moments)

    def cut(self, at: int, draw: random.Random, out: Path) -> int:
        """Write a folder as a power cut just before a call may leave it.

        Args:
            at: index of the call.
            draw: random numbers.
            out: folder to write.

        Returns:
            The number of files that lost their last writes.
        """
        flushed, since, kept = self._flushed(at)
        ordered = draw.random() < 0.75
        together = draw.randint(max(flushed.values(), default=0), at)
        changed, done = 0, set()

        def make(inode: int, path: Path) -> None:
            nonlocal changed
            path.mkdir(exist_ok=True)
            done.add(inode)
            least = max(flushed.get(inode, 0), since.get(inode, 0))
            moment = self.moments[together if ordered else draw.randint(least, at)]
            # A folder that did not exist yet at that moment is empty.
            for name, inner in sorted(moment.names.get(inode, {}).items()):
                if inner not in moment.names:
                    content, whole = self._content(inner, at, kept, draw)
                    changed += not whole
                    (path / name).write_bytes(content)
                elif inner not in done:
                    make(inner, path / name)

        make(0, out)
        return changed

    def _flushed(self, at: int) -> tuple[dict[int, int], dict[int, int], dict[int, str]]:
        """Return what is durable before a call.

        What existed when the log began counts as flushed.

        Returns:
            For each folder the index of its last flush; for each folder the index at which it
            first existed; and for each file the digest of its last flushed content.
        """
        first = self.moments[0]
        flushed, since = {0: 0}, dict.fromkeys(first.names, 0)
        kept = dict(first.contents)
        for number, moment in enumerate(self.moments[:at]):
            for inode in moment.names:
                since.setdefault(inode, number)
            if moment.call == "fsync" and moment.flushed in moment.contents:
                kept[moment.flushed] = moment.contents[moment.flushed]
            elif moment.call == "fsync":
                flushed[moment.flushed] = number
        return flushed, since, kept

    def _content(
        self, inode: int, at: int, kept: dict[int, str], draw: random.Random
    ) -> tuple[bytes, bool]:
        """Draw the content of a file, and say whether it is what was last written."""
        seen = (moment.contents.get(inode) for moment in reversed(self.moments[: at + 1]))
        last = next((digest for digest in seen if digest), None)
        new = self._bytes(last)
        if kept.get(inode) == last:
            return new, True
        old = self._bytes(kept.get(inode))
        found = torn(old, new, draw)
        return found, found == new

    def _bytes(self, digest: str | None) -> bytes:
        return b"" if digest is None else (self.folder / digest).read_bytes()


def _moment(line: tuple[str, int, dict[str, dict[str, int]], dict[str, str]]) -> Moment:
    """Parse a line of the log; JSON has inodes as text where they are keys."""
    call, flushed, names, contents = line
    return Moment(
        call,
        flushed,
        {int(inode): entries for inode, entries in names.items()},
        {int(inode): digest for inode, digest in contents.items()},
    )


def _renumbered(moment: Moment, numbers: dict[int, int]) -> Moment:
    """Return the state with other numbers in place of inodes."""
    return Moment(
        moment.call,
        numbers.get(moment.flushed, 0),
        {
            numbers[inode]: {name: numbers[inner] for name, inner in entries.items()}
            for inode, entries in moment.names.items()
        },
        {numbers[inode]: digest for inode, digest in moment.contents.items()},
    )


def torn(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """Draw what may be on disk of a file that changed from `old` to `new` without a flush."""
    match draw.randrange(6):
        case 0:
            return old
        case 1:
            return new
        case 2:
            return new[: draw.randint(0, len(new))]
        case 3:
            return new[: PAGE * draw.randint(0, len(new) // PAGE)]
        case 4:
            return b""
        case _:
            pages = range(0, len(new), PAGE)
            return b"".join(
                draw.choice((new[place : place + PAGE], old[place : place + PAGE], bytes(PAGE)))
                for place in pages
            )[: len(new)]


def record(folder: Path, log: Path) -> None:
    """Log from now on what this process does to a folder, by wrapping functions of `os`.

    Args:
        folder: the folder; it need not exist yet.
        log: empty folder for the log.
    """
    lock, seen = threading.RLock(), (log / _MOMENTS).open("a", encoding="utf-8")
    folder = folder.absolute()

    def look(call: str, path: Path | None, flushed: Path | None = None) -> None:
        if path is None or not (path == folder or folder in path.parents):
            return
        names, contents = _snapshot(folder, log)
        inode = 0 if flushed in (None, folder) else os.stat(flushed).st_ino
        seen.write(json.dumps([call, inode, names, contents]) + "\n")
        seen.flush()

    def before(name: str, real: Callable[..., object], *given: object, **options: object) -> object:
        with lock:
            last = given[1] if name in ("rename", "replace", "link") else given[0]
            look(name, _path(last, options.get("dir_fd")))
        return real(*given, **options)

    def fsync(real: Callable[[int], None], descriptor: int) -> None:
        with lock:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            look("fsync", path, path)
            real(descriptor)

    look("begin", folder)
    for name in _CALLS:
        setattr(os, name, partial(before, name, getattr(os, name)))
    for name in ("fsync", "fdatasync"):
        setattr(os, name, partial(fsync, getattr(os, name)))


def _path(name: object, folder: object) -> Path | None:
    """Return the path argument of a call as an absolute path; None for a descriptor."""
    if not isinstance(name, str | bytes | os.PathLike):
        return None
    path = Path(os.fsdecode(name))
    if isinstance(folder, int):
        path = Path(os.readlink(f"/proc/self/fd/{folder}")) / path
    return path.absolute()


def _snapshot(folder: Path, log: Path) -> tuple[Names, dict[int, str]]:
    """Return all names below a folder and the digests of all files; store their contents."""
    names: Names = {}
    contents: dict[int, str] = {}
    if not folder.is_dir():
        return names, contents
    folders = list(_folders(folder))
    known = {inode for inode, _ in folders}
    for inode, path in folders:
        names[inode] = {}
        for entry in os.scandir(path):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                names[inode][entry.name] = status.st_ino
                if status.st_ino not in contents:
                    contents[status.st_ino] = _keep(Path(entry.path), log)
            elif status.st_ino in known:
                names[inode][entry.name] = status.st_ino
    return names, contents


def _folders(folder: Path) -> Iterator[tuple[int, Path]]:
    yield 0, folder
    for place, folders, _ in os.walk(folder):
        for name in folders:
            yield os.stat(os.path.join(place, name)).st_ino, Path(place, name)


def _keep(file: Path, log: Path) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError:  # deleted since the folder was listed
        content = b""
    digest = hashlib.sha256(content).hexdigest()
    kept = log / digest
    if not kept.exists():
        kept.write_bytes(content)
    return digest
