"""Callbacks that report the progress of long work, independent of how it is shown."""

from collections.abc import Callable

# Called with the number of steps done and the total number of steps. In the first call, the steps
# done are 0, or those of an interrupted run that is continued.
OnProgress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Ignore the progress that is reported."""


# Called with the title of a task that starts now; returns the callback for the task's progress.
Announce = Callable[[str], OnProgress]


def quietly(title: str) -> OnProgress:
    """Ignore the title and return a callback that ignores the progress."""
    return silent
