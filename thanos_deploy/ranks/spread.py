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
        layer: number of the layer, of all layers whose turn it is.
        rows, cols: of what is solved.
    """

    group: int
    layer: int
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
    """The rank that solves each job, so that all are done as early as this finds out.

    Either each layer stays with one rank, or the runs of its rows go to several, which then all
    factor its Hessian and ask each other for what they count. The second only if it ends earlier.

    Args:
        jobs: in any order.
        ranks: how many there are.
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
    """The rank of each job, and when the last one ends: the largest go first.

    Each goes to whoever ends it earliest. A rank that has a job of a group factors the Hessian of
    that group once, for all of them.

    Args:
        jobs: all of them.
        bundles: numbers of those, of one group each, that go together.
        ranks: how many there are.
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
