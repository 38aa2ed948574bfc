"""The layers whose turn it is as jobs, each done by the rank that it falls to.

A layer is one job, or several where its rows do not depend on each other: a job is of the same rows
for every number of ranks, so that it has the same result whoever does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix
from thanos_deploy.ranks import spread
from thanos_deploy.ranks.group import Ranks, current
from thanos_deploy.ranks.spread import Job
from thanos_deploy.solver.division import Division

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
                layer = len({job.layer for job in jobs})
                for part in cut(name, rows):
                    self.rows.append(Rows(name, part.start, part.stop))
                    self._groups.append(number)
                    jobs.append(Job(number, layer, part.stop - part.start, cols))
        self.owners = spread.owners(jobs, current().size)

    def own(self, group: int) -> dict[int, Rows]:
        """Those of a group that are this rank's, by their numbers."""
        return {
            place: rows
            for place, rows in enumerate(self.rows)
            if self._groups[place] == group and self.owners[place] == current().rank
        }

    def own_layers(self, group: int) -> dict[str, dict[int, Rows]]:
        """The same by layer, in the order in which all ranks take layers."""
        layers: dict[str, dict[int, Rows]] = {}
        for place, rows in self.own(group).items():
            layers.setdefault(rows.linear, {})[place] = rows
        return layers

    def divisions(self) -> dict[str, Division]:
        """How the rows of this rank's layers are divided; all ranks ask for it, at once."""
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
                add=None if team is None else team.add,
            )
        return divisions

    def helpers(self) -> Ranks | None:
        """Who factors the Hessian of the only group, if this rank and others do; all ranks ask.

        Of several groups, each rank has its own to factor meanwhile.
        """
        members = self._who(range(len(self.rows)))
        if len(set(self._groups)) > 1 or len(members) == 1:
            return None
        return current().team(members)

    def _who(self, places: Sequence[int]) -> tuple[int, ...]:
        """The ranks that some jobs fall to."""
        return tuple(sorted({self.owners[place] for place in places}))

    def gather(self, done: Mapping[int, T], kind: type[T]) -> list[T]:
        """What every rank has to say of each of its jobs, in the order of the jobs.

        Args:
            done: by number of the job.
            kind: type of what is said, a dataclass.
        """
        every = current().merge({str(place): one for place, one in done.items()}, kind)
        return [every[str(place)] for place in range(len(self.rows))]
