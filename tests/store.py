"""Folders that test processes share; each is made once, by the first that asks for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


class Store:
    """Folders that all test processes of a run share. Not to be changed."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # With pytest-xdist, every process has its own folder inside the folder of the run.
        self._folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
        self._folder.mkdir(exist_ok=True)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder of a name, after making it if it is missing.

        Args:
            name: name of the folder.
            make: fills the empty folder; called only if the folder is missing.
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
