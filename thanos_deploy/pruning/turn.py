"""Prune the layers of one turn, each job on the rank that owns it.

Afterwards every rank has every pruned layer.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.machine import environment
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.jobs import Jobs, Rows
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedLayer
from thanos_deploy.pruning.solution import aim, mask_only, solve
from thanos_deploy.ranks import schedule
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.division import Division
from thanos_deploy.solver.hessian import prepare
from thanos_deploy.solver.layer import Factor, LayerProblem, Loss, fraction_lost
from thanos_deploy.solver.triangular import Helpers

# Freed memory is returned to the system from this amount on; less is not worth requesting it anew.
_FREED_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class _Solved:
    """Report on one job, without its weights.

    Attributes:
        energy, lost: see `Loss`.
        damping, solver, failures, seconds: see `PrunedLayer`.
    """

    energy: float
    lost: float
    damping: float
    solver: str
    failures: tuple[str, ...]
    seconds: float


def prune_turn(
    visit: Visit,
    groups: Sequence[Sequence[str]],
    statistics: dict[str, Statistics],
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    products: torch.dtype,
) -> dict[str, PrunedLayer]:
    """Prune layers in place and report on them.

    Later layers and blocks see the weights as they are written, rounding included.

    Args:
        visit: the block.
        groups: names of layers, relative to the block; the layers of a group read one input.
        statistics: statistics of these inputs, by the first name of each group; emptied, so that
            memory is freed.
        patterns: the pattern of each layer, by its full name.
        recipe: how to prune.
        products: see `LayerProblem`.

    Returns:
        a report on each layer, by its name relative to the block.
    """
    method, device = methods.load(recipe.method), visit.device

    def cut(linear: str, rows: int) -> Sequence[slice]:
        if method.divisible(patterns[visit.prefix + linear], recipe.options):
            return schedule.pieces(rows, device.type)
        return [slice(0, rows)]

    jobs = Jobs(visit, groups, cut)
    divisions, helpers = jobs.divisions(), jobs.helpers()
    solved: dict[int, _Solved] = {}
    for number, group in enumerate(groups):
        seen = statistics.pop(group[0])
        # Otherwise glibc would take a large tensor from the system and keep freed memory beside it.
        if 8 * seen.hessian.numel() > environment.HEAP_TENSOR_BYTES:
            environment.return_freed_memory()
        own = jobs.own_layers(number)
        solved |= _solve(visit, own, divisions, helpers, seen, patterns, recipe, products)
        del seen
    environment.return_freed_memory(at_least=_FREED_BYTES)
    parts: dict[str, list[_Solved]] = {}
    for rows, owner, one in zip(jobs.rows, jobs.owners, jobs.gather(solved, _Solved), strict=True):
        _broadcast(visit, rows, owner)
        parts.setdefault(rows.linear, []).append(one)
    return {
        linear: _report(visit, linear, patterns[visit.prefix + linear], its)
        for linear, its in parts.items()
    }


def _solve(
    visit: Visit,
    layers: Mapping[str, Mapping[int, Rows]],
    divisions: Mapping[str, Division],
    helpers: Helpers | None,
    statistics: Statistics,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    products: torch.dtype,
) -> dict[int, _Solved]:
    """Do this rank's jobs for layers that read one input, one layer after another."""
    method = methods.load(recipe.method)
    hessian, cross = statistics.hessian, statistics.cross
    # A factor is as large as its Hessian, so it is kept only if it is needed again, or if other
    # ranks help to compute it.
    again = len(layers) > 1 or cross is not None or helpers is not None
    factors: dict[tuple[float, str], Factor] | None = {} if again else None
    few = statistics.too_few if not visit.structure.routed.isdisjoint(layers) else ""
    if not statistics.mass:
        hessian = torch.eye(len(hessian), device=hessian.device)
    damping = recipe.options if isinstance(recipe.options, Damping) else None
    if helpers is not None and damping is not None and not few:
        # Before any layer is solved, because the ranks have different layers.
        prepare(LayerProblem(hessian[:0], hessian, visit.prefix, factors), damping, helpers)
    solved = {}
    for linear, jobs in layers.items():
        started = time.perf_counter()
        name = visit.prefix + linear
        problem = LayerProblem(
            _rows_of(matrix(visit.block.get_submodule(linear)), list(jobs.values())).float(),
            hessian,
            name,
            factors,
            products,
            divisions[linear],
        )
        if few and damping is not None:  # the method updates weights with the Hessian
            solution = mask_only(problem, patterns[name], (few,))
        else:
            aimed, failures = aim(problem, cross, recipe.walk.dense_target, recipe.options)
            solution = solve(
                problem,
                patterns[name],
                method,
                recipe.options,
                aimed=aimed,
                failures=(few, *failures) if few and not statistics.mass else failures,
            )
        result = solution.result
        for rows, run in zip(jobs.values(), problem.division.runs, strict=True):
            visit.write(linear, result.weight[run], rows.slice)
        seconds = time.perf_counter() - started
        for place, loss in zip(jobs, result.losses, strict=True):
            solved[place] = _Solved(
                energy=loss.energy,
                lost=loss.lost,
                damping=result.damping,
                solver=solution.solver,
                failures=solution.failures,
                seconds=seconds / len(jobs),
            )
    return solved


def _rows_of(weight: Tensor, jobs: Sequence[Rows]) -> Tensor:
    """The rows of some jobs, contiguous in memory; copied only if needed."""
    first, last = jobs[0], jobs[-1]
    if all(one.stop == other.start for one, other in pairwise(jobs)):
        return weight[first.start : last.stop].contiguous()
    return torch.cat([weight[rows.slice] for rows in jobs])


def _broadcast(visit: Visit, rows: Rows, owner: int) -> None:
    """Broadcast the weights of a job from its owner to all ranks."""
    ranks = current()
    if ranks.size == 1:
        return
    sent = matrix(visit.block.get_submodule(rows.linear))[rows.slice].contiguous()
    ranks.broadcast(sent, owner)
    if ranks.rank != owner:
        visit.write(rows.linear, sent, rows.slice)


def _report(visit: Visit, linear: str, pattern: Pattern, parts: Sequence[_Solved]) -> PrunedLayer:
    """Combine the reports on the jobs of a layer."""
    weight = matrix(visit.block.get_submodule(linear))
    verdict = judge(weight != 0, pattern)
    # Jobs whose energy is not finite are left out.
    losses = [Loss(part.energy, part.lost) for part in parts if math.isfinite(part.energy)]
    return PrunedLayer(
        name=visit.prefix + linear,
        rows=weight.shape[0],
        cols=weight.shape[1],
        pattern=str(pattern),
        sparsity=verdict.sparsity,
        pattern_holds=verdict.holds,
        relative_error=fraction_lost(losses),
        damping=max(part.damping for part in parts),
        # If some rows needed another solver, because attempts failed, theirs is reported.
        solver=max(parts, key=lambda part: len(part.failures)).solver,
        failures=tuple(dict.fromkeys(one for part in parts for one in part.failures)),
        seconds=sum(part.seconds for part in parts),
    )
