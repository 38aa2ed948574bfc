"""Quantise a model block by block: the last step, once every weight has its final value.

A walk of its own, after pruning, cutting, tuning and training, each of which would leave the grid.
Each layer sees its inputs as the quantised layers before it make them.

One walk for both would save forward passes where nothing follows the pruning of a layer. But the
preset "best" tunes a whole block, `--recover` trains the whole model, and cutting decides on widths
from a walk before: it would serve the preset "fast" alone, and be a second way to the same result.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.errors import HessianError, InputError, UsageError
from thanos_deploy.machine import devices
from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import products_in
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.rounding import rounded
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.jobs import Jobs
from thanos_deploy.pruning.layers import gather
from thanos_deploy.pruning.result import Quantisation
from thanos_deploy.ranks import spread
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.codes import Quantised, round_to
from thanos_deploy.solver.damping import Damping
from thanos_deploy.solver.grid import Grid, parse
from thanos_deploy.solver.layer import Factor, LayerProblem
from thanos_deploy.solver.quantise import quantise

# A few huge inputs leave the median as it is. Chosen on held-out C4; see benchmarks/LOG.md.
DAMPING = Damping(damping=0.15, damping_mode="median")

# Of the tensors of a layer in the files of codes, and the entry of the files' metadata.
_CODES, _SCALE, _ZERO = ".codes", ".scale", ".zero"
_GRID = "grid"

# Rows of a layer that are quantised as one at least: columns go one by one, and each takes as long
# as a few hundred rows do.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer as it was quantised.

    Attributes:
        name: full name in the model.
        relative_error: fraction of the energy of its output that is lost; None where the
            statistics could not be used.
        rounding_error: the same if it had been rounded.
        failure: why the statistics could not be used, and it was rounded; empty if they could.
    """

    name: str
    relative_error: float | None
    rounding_error: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """The layers of one block, in the order of the forward pass."""

    layers: tuple[LayerReport, ...]


def quantise_model(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    codes: Path | None,
    grid: Grid,
    *,
    damping: Damping = DAMPING,
    forward: torch.dtype = torch.float32,
    device: torch.device = CPU,
    hold: Place = "auto",
    on_progress: OnProgress = silent,
) -> Quantisation:
    """Quantise the linear layers of every block, and write an ordinary model folder.

    The folder has the values that the codes stand for, rounded to the dtypes of the checkpoint. The
    codes themselves go to one file for each block: of each layer `NAME.codes`, int8[rows, cols] or,
    for an asymmetric grid, uint8; `NAME.scale`, float16[rows, groups]; and for an asymmetric grid
    `NAME.zero`, uint8[rows, groups]. The files' metadata name the grid.

    Args:
        checkpoint: the model, pruned or not.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder; None for a rank that writes nothing.
        codes: an empty folder for the files of codes; likewise.
        grid: what to quantise to.
        damping: of the Hessians.
        forward: the dtype in which blocks run, float32 or bfloat16.
        device: where each block is while it is quantised.
        hold: see `walk.visit_blocks`.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing or have NaN, or a value does not fit their dtype.
        ResourceError: a block does not fit into the GPU's memory.
    """
    if destination is not None:
        copy_companions(checkpoint.folder, destination, None)

    def work(visit: Visit) -> BlockReport:
        found: dict[str, Tensor] = {}
        with devices.memory_for(f"block {visit.index}"):
            layers = tuple(_layers(visit, grid, damping, found))
        if codes is not None:
            save_file(found, codes / f"{visit.index:05}.safetensors", metadata={_GRID: str(grid)})
        return BlockReport(layers)

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
            forward=forward,
            device=device,
            hold=hold,
            on_progress=on_progress,
        )
    return _summary(grid, blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The codes of a quantised model, one layer in memory at a time.

    Attributes:
        folder: with the files that `quantise_model` wrote.
        grid: what the model was quantised to.
        files: name of a tensor -> the file that has it.
    """

    folder: Path
    grid: Grid
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Codes":
        """Read what there is, and no tensor.

        Raises:
            InputError: a file is not readable, or there is none.
        """
        grids, found = set(), {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    grids.add(parse(file.metadata()[_GRID]))
                    found.update(dict.fromkeys(file.keys(), path))
            (grid,) = grids
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, UsageError) as error:
            raise _unreadable(folder, f"not readable: {error}") from error
        return cls(folder, grid, found)

    def of(self, name: str, weight: Tensor) -> Quantised:
        """The codes of a layer, with scales in float32.

        Args:
            name: its full name.
            weight: [rows, cols], as it is stored.

        Raises:
            InputError: the layer is not there, or its weight has other values than the codes.
        """
        try:
            codes, scale = (self._read(name + part) for part in (_CODES, _SCALE))
            zero = torch.zeros_like(scale) if self.grid.symmetric else self._read(name + _ZERO)
            quantised = Quantised(self.grid, codes.to(torch.int16), scale.float(), zero.float())
            same = rounded(quantised.weight, weight.dtype, name).equal(weight)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise _unreadable(self.folder, f"{name} is not there: {error}") from error
        if not same:
            raise _unreadable(self.folder, f"the codes of {name} are not those of its weight")
        return quantised

    def _read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _unreadable(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: {what}",
        fix="restore it from a copy of the bundle, or prune again with --overwrite",
    )


def _layers(
    visit: Visit, grid: Grid, damping: Damping, found: dict[str, Tensor]
) -> Iterator[LayerReport]:
    """Quantise, in place, the layers of a block, those that read one input after another."""
    names = {visit.prefix + linear for linear in visit.structure.linears}
    for groups, collected in gather(visit, names, Walk(true_sequential=True)):
        jobs = Jobs(visit, groups, lambda _, rows: spread.even(rows, max(1, rows // _ROWS)))
        solved: dict[int, Quantised] = {}
        said: dict[int, _Solved] = {}
        for number, group in enumerate(groups):
            hessian = collected.pop(group[0]).hessian
            factors: dict[tuple[float, str], Factor] = {}
            for place, rows in jobs.own(number).items():
                weight = matrix(visit.block.get_submodule(rows.linear))[rows.slice].float()
                problem = LayerProblem(weight, hessian, visit.prefix + rows.linear, factors)
                solved[place], said[place] = _solve(problem, grid, damping)
        every = jobs.gather(said, _Solved)
        for group in groups:
            for linear in group:
                places = [place for place, rows in enumerate(jobs.rows) if rows.linear == linear]
                whole = _joined(
                    [_spread(visit, jobs, place, grid, solved.pop(place, None)) for place in places]
                )
                visit.write(linear, whole.weight)
                name, kind = visit.prefix + linear, torch.int8 if grid.symmetric else torch.uint8
                found[name + _CODES] = whole.codes.to("cpu", kind)
                found[name + _SCALE] = whole.scale.to("cpu", torch.float16)
                if not grid.symmetric:
                    found[name + _ZERO] = whole.zero.to("cpu", torch.uint8)
                yield _report(name, [every[place] for place in places])


@dataclass(frozen=True, slots=True)
class _Solved:
    """What became of a job, but for the codes.

    Attributes:
        energy: of the output of these rows.
        lost, lost_by_rounding: of it, by the codes, and if every weight had been rounded; None
            where the statistics could not be used.
        failure: why they could not.
    """

    energy: float
    lost: float | None
    lost_by_rounding: float | None
    failure: str


def _solve(problem: LayerProblem, grid: Grid, damping: Damping) -> tuple[Quantised, _Solved]:
    """With compensation if the statistics allow it, else rounded."""
    try:
        solved = quantise(problem, grid, damping)
    except HessianError as error:
        if not bool(problem.weight.isfinite().all()):
            raise
        return round_to(problem.weight, grid), _Solved(0.0, None, None, error.message)
    energy = solved.energy
    return solved.quantised, _Solved(
        energy, solved.relative_error * energy, solved.rounding_error * energy, ""
    )


def _spread(
    visit: Visit, jobs: Jobs, place: int, grid: Grid, solved: Quantised | None
) -> Quantised:
    """On all ranks what one has solved; `solved` is None on the others."""
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
        current().spread(tensor, owner)
    return solved


def _joined(parts: Sequence[Quantised]) -> Quantised:
    """A layer from its rows."""
    return Quantised(
        parts[0].grid,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero for part in parts]),
    )


def _report(name: str, parts: Sequence[_Solved]) -> LayerReport:
    """The report of a layer from those of its jobs, whose statistics are the same."""
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


def _summary(grid: Grid, blocks: Sequence[BlockReport]) -> Quantisation:
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
    )
