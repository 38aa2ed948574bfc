"""What several test processes share: each thing is made once, by the first that asks for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


class Store:
    """Folders that all test processes of a run see, and none may change."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # With pytest-xdist, every process has a folder of its own in one of the whole run.
        self._folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
        self._folder.mkdir(exist_ok=True)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of that name.

        Args:
            name: what to call it.
            make: fills an empty folder, if it is not there yet.
        """
        done = self._folder / name
        with FileLock(self._folder / f"{name}.lock"):
            if not done.exists():
                unfinished = self._folder / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(done)
        return done
