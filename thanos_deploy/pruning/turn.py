"""Prune the layers whose turn it is, each by the rank that it falls to.

Afterwards every rank has every layer.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from thanos_deploy import methods
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.walk import Visit
from thanos_deploy.machine import environment
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.jobs import Jobs, Rows
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedLayer
from thanos_deploy.pruning.solution import Solution, aim, mask_only, solve
from thanos_deploy.ranks import spread
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.layer import Factor, LayerProblem, output_energy

# So much freed memory is worth the time that it takes to get it anew.
_FREED_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class _Solved:
    """What became of a job, but for the weights.

    Attributes:
        energy: of the output that these rows aim at; 1 where the job is the whole layer.
        relative_error, damping, solver, failures, seconds: see `PrunedLayer`.
    """

    energy: float
    relative_error: float
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
    """Prune layers in place; their reports by name, seen from the block.

    What the following layers and blocks see is what is written, rounding included.

    Args:
        visit: the block.
        groups: names of layers that read one input each.
        statistics: of these inputs, by the first name of each group; gone afterwards.
        patterns: by full name.
        recipe: how to prune.
        products: see `LayerProblem`.
    """
    method, device = methods.load(recipe.method), visit.device

    def cut(linear: str, rows: int) -> Sequence[slice]:
        if method.independent_rows(patterns[visit.prefix + linear], recipe.options):
            return spread.pieces(rows, device.type)
        return [slice(0, rows)]

    jobs = Jobs(visit, groups, cut)
    solved: dict[int, _Solved] = {}
    for number, group in enumerate(groups):
        seen = statistics.pop(group[0])
        # What glibc takes from the system would be beside what it has kept of freed memory.
        if 8 * seen.hessian.numel() > environment.HEAP_TENSOR_BYTES:
            environment.return_freed_memory()
        solved |= _solve(visit, jobs.own(number), seen, patterns, recipe, products)
        del seen
    environment.return_freed_memory(at_least=_FREED_BYTES)
    parts: dict[str, list[_Solved]] = {}
    for rows, owner, one in zip(jobs.rows, jobs.owners, jobs.gather(solved, _Solved), strict=True):
        _spread(visit, rows, owner)
        parts.setdefault(rows.linear, []).append(one)
    return {
        linear: _report(visit, linear, patterns[visit.prefix + linear], its)
        for linear, its in parts.items()
    }


def _solve(
    visit: Visit,
    jobs: Mapping[int, Rows],
    statistics: Statistics,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    products: torch.dtype,
) -> dict[int, _Solved]:
    """Do the jobs of layers that read one input."""
    method = methods.load(recipe.method)
    hessian, cross = statistics.hessian, statistics.cross
    # Of a wide layer it is as large as its Hessian, so it is kept only if it is needed again.
    again = len(jobs) > 1 or cross is not None
    factors: dict[tuple[float, str], Factor] | None = {} if again else None
    linears = {rows.linear for rows in jobs.values()}
    few = statistics.too_few if not linears.isdisjoint(visit.structure.routed) else ""
    if not statistics.mass:
        hessian = torch.eye(len(hessian), device=hessian.device)
    solved = {}
    for place, rows in jobs.items():
        started = time.perf_counter()
        name = visit.prefix + rows.linear
        whole = matrix(visit.block.get_submodule(rows.linear))
        problem = LayerProblem(whole[rows.slice].float(), hessian, name, factors, products)
        if few and isinstance(recipe.options, Damping):  # a method that updates by the Hessian
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
        energy = 1.0
        if rows.stop - rows.start < len(whole):
            energy = _energy(solution, problem)
        visit.write(rows.linear, solution.result.weight, rows.slice)
        solved[place] = _Solved(
            energy=energy,
            relative_error=solution.result.relative_error,
            damping=solution.result.damping,
            solver=solution.solver,
            failures=solution.failures,
            seconds=time.perf_counter() - started,
        )
    return solved


def _energy(solution: Solution, problem: LayerProblem) -> float:
    """Energy of the output that some rows aim at; what is not finite counts for nothing."""
    energy = solution.result.energy
    if energy is None:
        energy = output_energy(problem.weight, problem.hessian).sum().item()
    return energy if abs(energy) < float("inf") else 0.0


def _spread(visit: Visit, rows: Rows, owner: int) -> None:
    """Give all ranks the weights that one has solved."""
    ranks = current()
    if ranks.size == 1:
        return
    sent = matrix(visit.block.get_submodule(rows.linear))[rows.slice].contiguous()
    ranks.spread(sent, owner)
    if ranks.rank != owner:
        visit.write(rows.linear, sent, rows.slice)


def _report(visit: Visit, linear: str, pattern: Pattern, parts: Sequence[_Solved]) -> PrunedLayer:
    """The report of a layer from those of its jobs."""
    weight = matrix(visit.block.get_submodule(linear))
    verdict = judge(weight != 0, pattern)
    error = parts[0].relative_error
    if len(parts) > 1:
        energy = sum(part.energy for part in parts)
        lost = sum(part.relative_error * part.energy for part in parts)
        error = lost / energy if energy else 0.0
    return PrunedLayer(
        name=visit.prefix + linear,
        rows=weight.shape[0],
        cols=weight.shape[1],
        pattern=str(pattern),
        sparsity=verdict.sparsity,
        pattern_holds=verdict.holds,
        relative_error=error,
        damping=max(part.damping for part in parts),
        # Where some rows could not be solved as the others were, it is theirs that is told.
        solver=max(parts, key=lambda part: len(part.failures)).solver,
        failures=tuple(dict.fromkeys(one for part in parts for one in part.failures)),
        seconds=sum(part.seconds for part in parts),
    )
