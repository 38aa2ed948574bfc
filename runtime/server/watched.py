"""Detect changes of files that are mapped into the memory of a running server.

Writing into such a file changes the weights of the running server; truncating it crashes the
process. Putting another file in its place, under the same name, does no harm, but the server goes
on to serve the old one. In all these cases, the server should not get any more requests.
"""

from collections.abc import Sequence
from pathlib import Path


class Watched:
    """Some files, and their state when they were first looked at."""

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        """Record the present state of the files."""
        self._seen = {path: _look(path) for path in paths}

    def changed(self) -> Path | None:
        """Return a file that was replaced or written to; None if there is none."""
        return next((path for path, seen in self._seen.items() if _look(path) != seen), None)


def _look(path: Path) -> tuple[int, ...] | None:
    """Return the identity, size and time of change of a file; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
