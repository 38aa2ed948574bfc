"""Progress, notes and errors of a command, on standard error."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from thanos_deploy.progress import OnProgress, silent

# Least time in seconds between two lines of progress where there is no terminal.
_SECONDS_BETWEEN_LINES = 10.0

_errors = Console(stderr=True)


def quiet_libraries() -> None:
    """Keep the libraries' own bars, notes and warnings off the user's terminal."""
    import torch  # noqa: F401 - importing it sets up its loggers, so it has to come first
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Announcer:
    """Shows the progress of tasks: as bars with the remaining time, as lines, or not at all."""

    def __init__(self, bars: Progress | None, *, quiet: bool) -> None:
        self._bars = bars
        self._quiet = quiet

    def __call__(self, title: str) -> OnProgress:
        """Start a task and return its progress callback; see `progress.Announce`."""
        if self._quiet:
            return silent
        return self._lines(title) if self._bars is None else self._bar(self._bars, title)

    def _bar(self, bars: Progress, title: str) -> OnProgress:
        task = bars.add_task(title, total=None)

        def on_progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return on_progress

    def _lines(self, title: str) -> OnProgress:
        started = last = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if 0 < done < total and now - last < _SECONDS_BETWEEN_LINES:
                return
            last = now
            spent = now - started
            left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            print(f"{title}: {done}/{total}, {spent:.0f} s{left}", file=sys.stderr, flush=True)

        return on_progress


@contextmanager
def announcer(*, quiet: bool) -> Iterator[Announcer]:
    """Show progress on standard error: as bars in a terminal, else as a line now and then."""
    if quiet or not _errors.is_terminal:
        yield Announcer(None, quiet=quiet)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_errors,
    ) as bars:
        yield Announcer(bars, quiet=False)


def show_note(message: str) -> None:
    """Print a note before the work begins."""
    print(f"Note: {message}", file=sys.stderr)


def show_error(message: str) -> None:
    """Print an error."""
    print(f"Error: {message}", file=sys.stderr)
