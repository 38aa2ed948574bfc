"""Assign layers, or pieces of their rows, to ranks: pure functions of sizes, the same on all."""

from collections.abc import Sequence
from dataclasses import dataclass

# By device type: a layer with more rows than the first number is cut into at least two pieces, and
# into so many that, up to `_PIECES`, none has more rows than the second number. Every additional
# piece costs time, and products of few rows run below full speed. A GPU needs more rows than a CPU
# to be busy, so that only the widest layers of the largest models are cut for it.
_CUT = {"cpu": (512, 1024), "cuda": (16384, 16384)}

# Largest number of pieces of a layer.
_PIECES = 8


def pieces(rows: int, device: str) -> tuple[slice, ...]:
    """Divide the rows of a layer into pieces that are solved independently.

    Args:
        rows: number of rows of the layer.
        device: type of the device of its tensors, such as "cuda".
    """
    whole, most = _CUT.get(device, _CUT["cuda"])
    count = 1 if rows <= whole else min(_PIECES, max(2, -(-rows // most)))
    return tuple(even(rows, count))


def even(count: int, parts: int) -> list[slice]:
    """Divide `count` things into at most `parts` contiguous runs of nearly equal length."""
    parts = min(count, parts)
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work for one rank: some or all rows of a layer.

    Attributes:
        group: number of the group of layers that read the same input. They share a Hessian, which
            has to be factored first.
        layer: number of the layer, among all layers of the turn.
        rows, cols: shape of the piece of the weight.
    """

    group: int
    layer: int
    rows: int
    cols: int


def factor_cost(cols: int) -> float:
    """Relative cost of factoring a Hessian, in the unit of `job_cost`."""
    # A Cholesky factor and its inverse, cols^3 / 3 products each, in float64.
    return 4 / 3 * cols**3


def job_cost(job: Job) -> float:
    """Relative cost of solving a job once its Hessian has been factored."""
    # Counts the products of the preset `best`: eight steps, the errors, the target, and the blocks.
    return 24.0 * job.rows * job.cols**2


def owners(jobs: Sequence[Job], ranks: int) -> tuple[int, ...]:
    """Assign each job to a rank, with a greedy schedule that ends early.

    Two schedules are compared. In the first, all jobs of a layer go to one rank. In the second,
    they may go to several ranks, which then all factor the layer's Hessian and exchange counts. The
    second schedule is taken only if it ends earlier.

    Args:
        jobs: the jobs, in any order.
        ranks: number of ranks.

    Returns:
        the rank of each job.
    """
    layers: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        layers.setdefault(job.layer, []).append(number)
    whole, end_of_whole = _shared_out(jobs, list(layers.values()), ranks)
    apart, end_of_apart = _shared_out(jobs, [[number] for number in range(len(jobs))], ranks)
    return whole if end_of_whole <= end_of_apart else apart


def _shared_out(
    jobs: Sequence[Job], bundles: Sequence[Sequence[int]], ranks: int
) -> tuple[tuple[int, ...], float]:
    """Return the rank of each job, and the time at which the last rank ends.

    Bundles are assigned in order of falling cost, each to the rank that would finish it first. A
    rank that has jobs of a group factors the group's Hessian once, for all of them.

    Args:
        jobs: all jobs.
        bundles: lists of job numbers; the jobs of a bundle go to the same rank, and belong to the
            same group.
        ranks: number of ranks.
    """
    busy = [0.0] * ranks
    factored: list[set[int]] = [set() for _ in range(ranks)]
    chosen = [0] * len(jobs)
    costs = [sum(job_cost(jobs[number]) for number in bundle) for bundle in bundles]
    for place in sorted(range(len(bundles)), key=lambda one: (-costs[one], one)):
        first = jobs[bundles[place][0]]
        ends = [
            spent
            + costs[place]
            + (0.0 if first.group in factored[rank] else factor_cost(first.cols))
            for rank, spent in enumerate(busy)
        ]
        rank = ends.index(min(ends))
        busy[rank] = ends[rank]
        factored[rank].add(first.group)
        for number in bundles[place]:
            chosen[number] = rank
    return tuple(chosen), max(busy)
