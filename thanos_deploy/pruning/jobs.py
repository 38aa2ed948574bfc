"""Split the layers of a turn, which are solved together, into jobs and assign each to a rank.

A layer is one job, or several jobs if its rows do not depend on each other. The rows of a job are
the same for every number of ranks, so its result does not depend on the rank that does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix
from thanos_deploy.ranks import schedule
from thanos_deploy.ranks.group import Ranks, current
from thanos_deploy.ranks.schedule import Job
from thanos_deploy.solver.division import Division

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a layer.

    Attributes:
        linear: name of the layer, relative to the block.
        start, stop: number of the first row, and one past the last.
    """

    linear: str
    start: int
    stop: int

    @property
    def slice(self) -> slice:
        """The rows as a slice."""
        return slice(self.start, self.stop)


class Jobs:
    """The jobs of a turn and the ranks that do them.

    Attributes:
        rows: the rows of each job, in the same order on all ranks.
        owners: the rank that does each job.
    """

    def __init__(
        self,
        visit: Visit,
        groups: Sequence[Sequence[str]],
        cut: Callable[[str, int], Sequence[slice]],
    ) -> None:
        """Cut the layers into jobs and assign each job to a rank.

        Args:
            visit: the block.
            groups: names of layers, relative to the block; the layers of a group read one input.
            cut: returns the pieces of a layer, given its name and its number of rows.
        """
        self.rows: list[Rows] = []
        self._groups: list[int] = []
        jobs: list[Job] = []
        for number, group in enumerate(groups):
            for name in group:
                rows, cols = matrix(visit.block.get_submodule(name)).shape
                layer = len({job.layer for job in jobs})
                for part in cut(name, rows):
                    self.rows.append(Rows(name, part.start, part.stop))
                    self._groups.append(number)
                    jobs.append(Job(number, layer, part.stop - part.start, cols))
        self.owners = schedule.owners(jobs, current().size)

    def own(self, group: int) -> dict[int, Rows]:
        """This rank's jobs of one group, by job number."""
        return {
            place: rows
            for place, rows in enumerate(self.rows)
            if self._groups[place] == group and self.owners[place] == current().rank
        }

    def own_layers(self, group: int) -> dict[str, dict[int, Rows]]:
        """This rank's jobs of one group, by layer and job number; all ranks use the same order."""
        layers: dict[str, dict[int, Rows]] = {}
        for place, rows in self.own(group).items():
            layers.setdefault(rows.linear, {})[place] = rows
        return layers

    def divisions(self) -> dict[str, Division]:
        """How the rows of this rank's layers are divided, by layer; a collective of all ranks."""
        ranks = current()
        places: dict[str, list[int]] = {}
        for place, rows in enumerate(self.rows):
            places.setdefault(rows.linear, []).append(place)
        divisions = {}
        for linear, runs in places.items():
            members = self._who(runs)
            team = ranks.team(members) if len(members) > 1 else None
            if ranks.rank not in members:
                continue
            own, start = {}, 0
            for number, place in enumerate(runs):
                if self.owners[place] == ranks.rank:
                    count = self.rows[place].stop - self.rows[place].start
                    own[number] = slice(start, start + count)
                    start += count
            divisions[linear] = Division(
                rows=self.rows[runs[-1]].stop,
                count=len(runs),
                own=own,
                add=None if team is None else team.all_reduce,
            )
        return divisions

    def helpers(self) -> Ranks | None:
        """The ranks that factor the Hessian of the only group together; a collective of all ranks.

        None if this rank is not among them, if it is the only one, or if there are several groups:
        then each rank has Hessians of its own to factor at the same time.
        """
        members = self._who(range(len(self.rows)))
        if len(set(self._groups)) > 1 or len(members) == 1:
            return None
        return current().team(members)

    def _who(self, places: Sequence[int]) -> tuple[int, ...]:
        """The ranks that do the given jobs, ascending."""
        return tuple(sorted({self.owners[place] for place in places}))

    def gather(self, done: Mapping[int, T], kind: type[T]) -> list[T]:
        """Collect the reports on all jobs from all ranks, in the order of the jobs.

        Args:
            done: this rank's reports, by job number.
            kind: type of a report, a dataclass.
        """
        every = current().merge({str(place): one for place, one in done.items()}, kind)
        return [every[str(place)] for place in range(len(self.rows))]
