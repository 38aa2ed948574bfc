"""Detect with Python's audit hooks when a process touches files that it must not touch."""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

# Audit events that change the file system, with the number of leading arguments that are names.
_CHANGES = {
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "shutil.copyfile": 2,
    "shutil.move": 2,
    "shutil.rmtree": 1,
}
_PROGRAMS = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Writing to these files changes nothing.
_NOWHERE = ("/dev/null",)


class Traps:
    """An audit hook that records forbidden accesses until the process ends."""

    def __init__(self, own: Path, baits: Iterable[Path]) -> None:
        """Install the audit hook.

        Args:
            own: folder that may be changed; temporary files go there too.
            baits: files and folders that must not even be read.
        """
        self._own = os.path.realpath(own)
        self._baits = tuple(os.path.realpath(bait) for bait in baits)
        self._seen: list[str] = []
        self._looks = True
        temporary = own / "temporary"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        os.environ["TMPDIR"] = str(temporary)
        sys.addaudithook(self._look)

    def taken(self) -> list[str]:
        """Return the forbidden accesses since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def switch(self, *, on: bool) -> None:
        """Turn the recording on or off."""
        self._looks = on

    def _look(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._looks:
            return
        if event == "open":
            self._opened(arguments)
        elif event in _CHANGES:
            count = _CHANGES[event]
            # Making a link changes the place of the link, not its target.
            names = arguments[1:2] if event in ("os.symlink", "os.link") else arguments[:count]
            for name in names:
                self._changed(event, name)
        elif event in _PROGRAMS:
            self._seen.append(f"{event} {arguments!r:.200}")

    def _opened(self, arguments: tuple[object, ...]) -> None:
        name, _, flags = arguments
        if not isinstance(name, str | bytes):
            return
        path = self._where(name)
        if any(path == bait or path.startswith(f"{bait}/") for bait in self._baits):
            self._seen.append(f"read {path}")
        elif isinstance(flags, int) and flags & _WRITES:
            self._changed("write", name)

    def _changed(self, event: str, name: object) -> None:
        if isinstance(name, str | bytes | os.PathLike):
            path = self._where(os.fspath(name))
            if not (path == self._own or path.startswith(f"{self._own}/") or path in _NOWHERE):
                self._seen.append(f"{event} {path}")

    def _where(self, name: str | bytes) -> str:
        """Return the real path of a name.

        A relative name belongs to an open folder, which was checked when it was opened.
        """
        text = os.fsdecode(name)
        if not os.path.isabs(text):
            return f"{self._own}/{text}" if ".." not in text else os.path.realpath(text)
        self._looks = False
        try:
            return os.path.realpath(text)
        except (OSError, ValueError):
            return text
        finally:
            self._looks = True
