"""Quantise a model block by block: the last step, once every weight has its final value.

This is a separate walk after pruning, cutting, tuning and training, each of which would move
weights off the grid. Each layer's inputs are those that the quantised layers before it produce, and
its target output is nearer to what it computes in the model before quantisation. If tuning is
requested, all layers of a block then take optimisation steps together, which end on the grid
(`straight_through`).

A single walk for pruning and quantisation would save forward passes where nothing follows the
pruning of a layer. But the preset "best" tunes whole blocks, `--recover` trains the whole model,
and cutting decides on widths from an earlier walk. So a single walk would serve the preset "fast"
alone, and be a second way to the same result.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.tune import Tuned, learn
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.errors import HessianError
from thanos_deploy.machine import devices
from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import multiplies_bfloat16, products_in
from thanos_deploy.methods import NO_TUNING, Tuning, Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.codes import save, tensors_of
from thanos_deploy.pruning.jobs import Jobs
from thanos_deploy.pruning.layers import gather
from thanos_deploy.pruning.result import Quantisation, TunedBlocks
from thanos_deploy.pruning.straight_through import QuantisedWeight
from thanos_deploy.ranks import schedule
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.codes import Quantised, round_to
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.grid import Grid
from thanos_deploy.solver.layer import Factor, LayerProblem
from thanos_deploy.solver.quantise import quantise

# The median, because a few huge inputs do not move it. Chosen on held-out C4, as the target is; see
# benchmarks/LOG.md.
DAMPING = Damping(damping=0.15, damping_mode="median")

# How every model is walked through for quantisation. The target is the model before it.
WALK = Walk(true_sequential=True, dense_target=0.8)

# Fewest rows of a layer in one job: columns are quantised one by one, and the fixed cost of each
# equals that of a few hundred rows.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Report on one quantised linear layer.

    Attributes:
        name: full name in the model.
        relative_error: fraction of the energy of the target output, on the calibration data, that
            the quantised weight misses, before the whole block is tuned; None if the statistics
            could not be used.
        rounding_error: the same if every weight had been rounded to the nearest grid value.
        failure: why the statistics could not be used, so that the layer was rounded; empty if they
            could.
    """

    name: str
    relative_error: float | None
    rounding_error: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """Report on one quantised block.

    Attributes:
        layers: reports on its layers, in the order of the forward pass.
        tuned: result of tuning all of them together; None if they were not tuned.
    """

    layers: tuple[LayerReport, ...]
    tuned: Tuned | None = None


def quantise_model(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    codes: Path | None,
    grid: Grid,
    *,
    tuning: Tuning = NO_TUNING,
    further: Tensor | None = None,
    damping: Damping = DAMPING,
    forward: torch.dtype = torch.float32,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[QuantisedBlock] | None = None,
    on_progress: OnProgress = silent,
) -> Quantisation:
    """Quantise the linear layers of every block, and write an ordinary model folder.

    The folder holds the values that the codes stand for, rounded to the dtypes of the checkpoint.
    The codes themselves are written to one file for each block; see `pruning.codes`.

    Args:
        checkpoint: the model, pruned or not.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder for the model; None for a rank that writes nothing.
        codes: an empty folder for the files of codes; None for a rank that writes nothing.
        grid: the grid to quantise to.
        tuning: steps that tune all layers of a block together, towards the block before
            quantisation.
        further: int64[count, length], tokens that only the tuning steps use; None for none.
        damping: damping of the Hessians.
        forward: the dtype in which blocks run, float32 or bfloat16.
        device: where each block is while it is quantised.
        hold: see `walk.visit_blocks`.
        journal: keeps every finished block; blocks that it already holds are not quantised again.
        on_progress: called after every finished block.

    Raises:
        ModelError: weights are missing or have NaN, or a value does not fit their dtype.
        ResourceError: a block does not fit into the GPU's memory.
    """
    if destination is not None:
        copy_companions(checkpoint.folder, destination, None)

    tuned = tuning.tune_steps > 0
    if journal is not None and codes is not None:
        for index in range(len(journal.reports)):
            save(codes, index, grid, dict(journal.parameters(index)))

    def work(visit: Visit) -> QuantisedBlock:
        with devices.memory_for(f"block {visit.index}"):
            report, quantised = _block(visit, grid, damping, tuning.tune_steps)
        if codes is not None:
            for name, layer in quantised.items():
                visit.beside.update(tensors_of(name, layer))
            save(codes, visit.index, grid, visit.beside)
        return report

    with (
        torch.no_grad(),
        products_in(torch.float32),
        WeightsCopy(checkpoint.weights, destination, None) as copy,
    ):
        blocks = visit_blocks(
            checkpoint,
            segments,
            work,
            copy=copy,
            further=further,
            tuned_in=torch.bfloat16 if tuned and multiplies_bfloat16(device) else None,
            with_dense=True,
            forward=forward,
            journal=journal,
            device=device,
            hold=hold,
            on_progress=on_progress,
        )
    return _summary(grid, blocks)


def _block(
    visit: Visit, grid: Grid, damping: Damping, steps: int
) -> tuple[QuantisedBlock, dict[str, Quantised]]:
    """Quantise the layers of a block in place, then tune them; return the layers by full name."""
    layers, quantised = [], {}
    with visit.clock.measure("solve"):
        for linear, report, layer in _layers(visit, grid, damping):
            layers.append(report)
            quantised[linear] = layer
    tuned = None
    if steps and quantised:
        assert visit.dense is not None
        with visit.clock.measure("tune"):
            learners = {
                linear: QuantisedWeight(
                    visit.block.get_submodule(linear),
                    matrix(visit.dense.block.get_submodule(linear)).float(),
                    layer,
                )
                for linear, layer in quantised.items()
            }
            tuned = learn(visit, learners, steps)
        if tuned.better:
            quantised = {linear: learner.quantised for linear, learner in learners.items()}
    return QuantisedBlock(tuple(layers), tuned), {
        visit.prefix + linear: layer for linear, layer in quantised.items()
    }


def _layers(
    visit: Visit, grid: Grid, damping: Damping
) -> Iterator[tuple[str, LayerReport, Quantised]]:
    """Quantise the layers of a block in place, turn by turn; yield each layer and its report."""
    names = {visit.prefix + linear for linear in visit.structure.linears}
    for groups, collected in gather(visit, names, WALK):
        jobs = Jobs(visit, groups, lambda _, rows: schedule.even(rows, max(1, rows // _ROWS)))
        solved: dict[int, Quantised] = {}
        said: dict[int, _Solved] = {}
        for number, group in enumerate(groups):
            seen = collected.pop(group[0])
            factors: dict[tuple[float, str], Factor] = {}
            for place, rows in jobs.own(number).items():
                weight = matrix(visit.block.get_submodule(rows.linear))[rows.slice].float()
                problem = LayerProblem(weight, seen.hessian, visit.prefix + rows.linear, factors)
                solved[place], said[place] = _solve(problem, seen.cross, grid, damping)
        every = jobs.gather(said, _Solved)
        for group in groups:
            for linear in group:
                places = [place for place, rows in enumerate(jobs.rows) if rows.linear == linear]
                whole = _joined(
                    [
                        _broadcast(visit, jobs, place, grid, solved.pop(place, None))
                        for place in places
                    ]
                )
                visit.write(linear, whole.weight)
                report = _report(visit.prefix + linear, [every[place] for place in places])
                yield linear, report, whole


@dataclass(frozen=True, slots=True)
class _Solved:
    """Report on one job, without its codes.

    Attributes:
        energy: output energy of the rows of the job.
        lost, lost_by_rounding: energy that the codes miss of the target output, and the same if
            every weight had been rounded; None if the statistics could not be used.
        failure: why the statistics could not be used; empty if they could.
    """

    energy: float
    lost: float | None
    lost_by_rounding: float | None
    failure: str


def _solve(
    problem: LayerProblem, cross: Tensor | None, grid: Grid, damping: Damping
) -> tuple[Quantised, _Solved]:
    """Quantise a job with compensation if the statistics allow it, otherwise by rounding."""
    try:
        solved = quantise(problem, grid, damping, cross=cross, fraction=WALK.dense_target)
    except HessianError as error:
        if not bool(problem.weight.isfinite().all()):
            raise
        return round_to(problem.weight, grid), _Solved(0.0, None, None, error.message)
    energy = solved.energy
    return solved.quantised, _Solved(
        energy, solved.relative_error * energy, solved.rounding_error * energy, ""
    )


def _broadcast(
    visit: Visit, jobs: Jobs, place: int, grid: Grid, solved: Quantised | None
) -> Quantised:
    """Broadcast the result of a job from its owner; `solved` is None on the other ranks."""
    rows, owner = jobs.rows[place], jobs.owners[place]
    if solved is None:
        count, cols = (
            rows.stop - rows.start,
            matrix(visit.block.get_submodule(rows.linear)).shape[1],
        )
        codes = torch.empty(count, cols, dtype=torch.int16, device=visit.device)
        scale, zero = (torch.empty(count, grid.groups(cols), device=visit.device) for _ in range(2))
        solved = Quantised(grid, codes, scale, zero)
    for tensor in (solved.codes, solved.scale, solved.zero):
        current().broadcast(tensor, owner)
    return solved


def _joined(parts: Sequence[Quantised]) -> Quantised:
    """Join the parts of a layer along its rows."""
    return Quantised(
        parts[0].grid,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero for part in parts]),
    )


def _report(name: str, parts: Sequence[_Solved]) -> LayerReport:
    """Combine the reports on the jobs of a layer, which share the same statistics."""
    lost = [part.lost for part in parts if part.lost is not None]
    rounding = [part.lost_by_rounding for part in parts if part.lost_by_rounding is not None]
    if len(lost) < len(parts):
        return LayerReport(name, None, None, next(one.failure for one in parts if one.failure))
    energy = sum(part.energy for part in parts)
    return LayerReport(
        name,
        sum(lost) / energy if energy else 0.0,
        sum(rounding) / energy if energy else 0.0,
    )


def _summary(grid: Grid, blocks: Sequence[QuantisedBlock]) -> Quantisation:
    layers = [layer for block in blocks for layer in block.layers]
    known = [one for one in layers if one.relative_error is not None]
    return Quantisation(
        grid=str(grid),
        median_relative_error=statistics.median(one.relative_error or 0.0 for one in known)
        if known
        else None,
        median_rounding_error=statistics.median(one.rounding_error or 0.0 for one in known)
        if known
        else None,
        rounded={one.name: one.failure for one in layers if one.failure},
        tuned=_tuning([block.tuned for block in blocks if block.tuned is not None]),
    )


def _tuning(blocks: Sequence[Tuned]) -> TunedBlocks | None:
    if not blocks:
        return None
    return TunedBlocks(
        blocks=len(blocks),
        better=sum(one.better for one in blocks),
        median_error_before=statistics.median(one.before for one in blocks),
        median_error=statistics.median(min(one.before, one.after) for one in blocks),
    )
