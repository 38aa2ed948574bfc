"""Progress of long work, without knowing who shows it."""

from collections.abc import Callable

# Called with the number of steps done and the number in all; the first call has 0 done.
OnProgress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


# Told the title of a piece of work that starts now, returns where to report its progress.
Announce = Callable[[str], OnProgress]


def quietly(title: str) -> OnProgress:
    """Announce nothing."""
    return silent
