"""Several ranks, each forked from one process that has imported everything."""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.commands import FORKS
from thanos_deploy import cli
from thanos_deploy.pruning import own_text, quantise, training_journal
from thanos_deploy.ranks import shards, spread
from thanos_deploy.solver import triangular


class RunningRanks:
    """Processes that find in their environment what torchrun would have put there."""

    def __init__(
        self,
        count: int,
        work: Callable[..., None],
        *arguments: Any,
        errors: Path,
        environment: Mapping[str, str] | None = None,
        only: int | None = None,
    ) -> None:
        """Start them.

        Args:
            count: how many.
            only: start this one alone, whose others never come.
            work: what each does; a function of a module.
            arguments: of it.
            errors: folder for what each writes to standard error, in a file of its number.
            environment: variables beside those of this process.
        """
        errors.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{_free_port()}"
        host, _, port = self.address.partition(":")
        address = {"MASTER_ADDR": host, "MASTER_PORT": port}
        self.processes: list[BaseProcess] = []
        for rank in range(count) if only is None else (only,):
            own = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            process = FORKS.Process(
                target=_run,
                args=(
                    work,
                    arguments,
                    {**os.environ, **address, **own, **(environment or {})},
                    errors / str(rank),
                ),
            )
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit codes; None for one that is not done within this time, and is killed."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes


def write_text(path: Path) -> Path:
    """A calibration text that is read at once, unlike the built-in one."""
    path.write_text(" ".join(str(number * number) for number in range(500)))
    return path


def make_small() -> None:
    """Cut what is small into as many parts as what is large, and compute with one thread."""
    shards.TOKENS_PER_BATCH = 128
    spread._CUT["cpu"], quantise._ROWS = (16, 16), 16
    triangular._SMALL, triangular._PART = 8, 4
    own_text._BATCH = 2
    training_journal._EVERY_SECONDS, training_journal._EVERY_WRITES = 0.0, 0
    torch.set_num_threads(1)


def command(*arguments: str) -> None:
    """Run `thanos-deploy`."""
    make_small()
    sys.argv = ["thanos-deploy", *arguments]
    cli.main()


def _run(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    errors: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    work(*arguments)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
