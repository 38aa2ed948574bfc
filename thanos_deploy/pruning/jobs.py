"""The layers whose turn it is as jobs, each done by the rank that it falls to.

A layer is one job, or several where its rows do not depend on each other: a job is of the same rows
for every number of ranks, so that it has the same result whoever does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.calibration.walk import Visit
from thanos_deploy.model.linear import matrix
from thanos_deploy.ranks import spread
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.spread import Job

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a layer.

    Attributes:
        linear: its name, seen from the block.
        start, stop: number of the first row, and of the one after the last.
    """

    linear: str
    start: int
    stop: int

    @property
    def slice(self) -> slice:
        """Where they are."""
        return slice(self.start, self.stop)


class Jobs:
    """The jobs of a turn.

    Attributes:
        rows: of each job, in one order on all ranks.
        owners: the rank that does each.
    """

    def __init__(
        self,
        visit: Visit,
        groups: Sequence[Sequence[str]],
        cut: Callable[[str, int], Sequence[slice]],
    ) -> None:
        """Share the work.

        Args:
            visit: the block.
            groups: names of layers that read one input each.
            cut: the pieces of a layer, from its name and the number of its rows.
        """
        self.rows: list[Rows] = []
        self._groups: list[int] = []
        jobs: list[Job] = []
        for number, group in enumerate(groups):
            for name in group:
                rows, cols = matrix(visit.block.get_submodule(name)).shape
                for part in cut(name, rows):
                    self.rows.append(Rows(name, part.start, part.stop))
                    self._groups.append(number)
                    jobs.append(Job(number, part.stop - part.start, cols))
        self.owners = spread.owners(jobs, current().size)

    def own(self, group: int) -> dict[int, Rows]:
        """Those of a group that are this rank's, by their numbers."""
        return {
            place: rows
            for place, rows in enumerate(self.rows)
            if self._groups[place] == group and self.owners[place] == current().rank
        }

    def gather(self, done: Mapping[int, T], kind: type[T]) -> list[T]:
        """What every rank has to say of each of its jobs, in the order of the jobs.

        Args:
            done: by number of the job.
            kind: type of what is said, a dataclass.
        """
        said = current().gather({str(place): encode(one) for place, one in done.items()})
        every = {int(place): one for of_rank in said for place, one in of_rank.items()}
        return [decode(kind, every[place]) for place in range(len(self.rows))]
