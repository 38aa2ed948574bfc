"""Which rank solves what: pure functions of sizes, which all ranks evaluate alike."""

from collections.abc import Sequence
from dataclasses import dataclass

# A layer of more rows than the first is cut in two, and so that no piece has more than the second.
# Each piece more takes time, and of few rows products run below full speed; a GPU needs more of
# them to be busy, and only the widest layers of the largest models are cut for it.
_CUT = {"cpu": (512, 1024), "cuda": (16384, 16384)}

# Pieces that a layer is cut into at most.
_PIECES = 8


def pieces(rows: int, device: str) -> tuple[slice, ...]:
    """The rows of a layer in pieces that are solved by themselves, whoever solves them.

    Args:
        rows: of the layer.
        device: type of the device of its tensors.
    """
    whole, most = _CUT.get(device, _CUT["cuda"])
    count = 1 if rows <= whole else min(_PIECES, max(2, -(-rows // most)))
    return tuple(even(rows, count))


def even(count: int, parts: int) -> list[slice]:
    """So many things, in so many runs or fewer, of nearly equal length."""
    parts = min(count, parts)
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]


@dataclass(frozen=True, slots=True)
class Job:
    """Something that one rank solves: some rows of a layer, or all.

    Attributes:
        group: number of the group of layers that read one input, whose Hessian is factored first.
        rows, cols: of what is solved.
    """

    group: int
    rows: int
    cols: int


def factor_cost(cols: int) -> float:
    """Seconds that factoring a Hessian takes, in any unit."""
    # A Cholesky factor and its inverse, cols^3 / 3 products each, in float64.
    return 4 / 3 * cols**3


def job_cost(job: Job) -> float:
    """The same of solving a job when the Hessian has been factored."""
    # The products of the preset `best`: eight steps, the errors, the target, and the blocks.
    return 24.0 * job.rows * job.cols**2


def owners(jobs: Sequence[Job], ranks: int) -> tuple[int, ...]:
    """The rank that solves each job; the largest jobs first, each to whoever ends it earliest.

    A rank that has a job of a group factors the Hessian of that group once, for all of them.

    Args:
        jobs: in any order.
        ranks: how many there are.
    """
    busy = [0.0] * ranks
    factored: list[set[int]] = [set() for _ in range(ranks)]
    chosen = [0] * len(jobs)
    for number in sorted(range(len(jobs)), key=lambda one: (-job_cost(jobs[one]), one)):
        job = jobs[number]
        ends = [
            spent + job_cost(job) + (0.0 if job.group in factored[rank] else factor_cost(job.cols))
            for rank, spent in enumerate(busy)
        ]
        rank = ends.index(min(ends))
        busy[rank] = ends[rank]
        factored[rank].add(job.group)
        chosen[number] = rank
    return tuple(chosen)
