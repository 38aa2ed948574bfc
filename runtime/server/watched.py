"""Files that are read for as long as the server runs, because they are mapped into its memory.

Whoever writes into such a file changes the weights under a running server; a file that is cut off
ends its process. To put another file in its place, under the same name, harms nothing, but what is
served is still the old one. Either way the server is no longer one to send requests to.
"""

from collections.abc import Sequence
from pathlib import Path


class Watched:
    """Some files as they were."""

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        """Look at them for the first time."""
        self._seen = {path: _look(path) for path in paths}

    def changed(self) -> Path | None:
        """One that is another file now, or was written to; None if there is none."""
        return next((path for path, seen in self._seen.items() if _look(path) != seen), None)


def _look(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
