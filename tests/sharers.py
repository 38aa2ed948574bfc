"""Simulate ranks that solve the rows of one layer together, with a thread for each rank."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from thanos_deploy.ranks.schedule import even
from thanos_deploy.solver.division import Division

T = TypeVar("T")


def divided(rows: int, runs: int, members: int) -> list[list[slice]]:
    """Divide the rows of a layer into runs, and deal the runs out to members in turns.

    Args:
        rows: number of rows of the layer.
        runs: most runs.
        members: most members; there are never more members than runs.

    Returns:
        The runs of each member.
    """
    every = even(rows, runs)
    return [every[first::members] for first in range(min(members, len(every)))]


def solve_together(
    matrix: Tensor, shares: Sequence[Sequence[slice]], work: Callable[[Tensor, Division], T]
) -> list[T]:
    """Let members work on their rows of a matrix at the same time.

    Args:
        matrix: [rows, cols].
        shares: the runs of rows of each member.
        work: called with a member's rows and its division, whose `add` is an all-reduce over the
            members.

    Returns:
        The result of each member.
    """
    whole = sorted((run for share in shares for run in share), key=lambda run: run.start)
    barrier = Barrier(len(shares))
    told: dict[int, Tensor] = {}

    def of(member: int) -> T:
        def add(counts: Tensor) -> Tensor:
            told[member] = counts
            barrier.wait(60)
            every = torch.stack([told[one] for one in range(len(shares))]).sum(dim=0)
            barrier.wait(60)
            return every

        own, start = {}, 0
        for run in shares[member]:
            own[whole.index(run)] = slice(start, start := start + run.stop - run.start)
        rows = torch.cat([matrix[run] for run in shares[member]])
        alone = len(shares) == 1
        return work(rows, Division(len(matrix), len(whole), own, None if alone else add))

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(of, range(len(shares))))
