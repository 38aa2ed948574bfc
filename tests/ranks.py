"""Run several ranks, each forked from one process that has imported everything."""

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
from thanos_deploy.ranks import schedule, shards
from thanos_deploy.solver import triangular


class RunningRanks:
    """Processes that have the environment variables which torchrun would set.

    Attributes:
        address: host and port at which the ranks meet.
        processes: the started processes, by rank.
    """

    def __init__(
        self,
        count: int,
        work: Callable[..., None],
        *arguments: Any,
        errors: Path,
        environment: Mapping[str, str] | None = None,
        only: int | None = None,
    ) -> None:
        """Start the ranks.

        Args:
            count: number of ranks.
            work: function that each rank calls; the rank imports it by its module.
            arguments: arguments of `work`.
            errors: folder for the standard error of each rank, in a file named by its number.
            environment: environment variables, in addition to those of this process.
            only: start this rank alone; the others never join.
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
        """Wait for each rank in turn, for at most some seconds each, and return the exit codes.

        A rank that still runs then is killed; its exit code is None.
        """
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes


def write_text(path: Path) -> Path:
    """Write a short calibration text, which is read faster than the built-in one."""
    path.write_text(" ".join(str(number * number) for number in range(500)))
    return path


def make_small() -> None:
    """Split small work into several parts, as large work is split, and compute on one thread."""
    shards.TOKENS_PER_BATCH = 128
    schedule._CUT["cpu"], quantise._ROWS = (16, 16), 16
    triangular._SMALL, triangular._PART = 8, 4
    own_text._BATCH = 2
    training_journal._EVERY_SECONDS, training_journal._EVERY_WRITES = 0.0, 0
    torch.set_num_threads(1)


def command(*arguments: str) -> None:
    """Run `thanos-deploy` in this process, with the sizes of `make_small`."""
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
