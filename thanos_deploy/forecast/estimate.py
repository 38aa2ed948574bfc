"""Estimate the time and the memory that pruning a model will take on this machine.

Cutting (structured pruning): the survey of all blocks has run before the estimate, and counts with
its measured time. Two blocks are cut with one batch of tokens, which does not shorten the solver's
time. The memory estimate is the peak of this process, because by then it has done the same work.

Setting weights to zero, time: a trial walk passes few tokens through two blocks, as pruning does.
It gives the seconds per token for collecting statistics and for the forward pass to the next block.
Then leading parts of these layers, of several sizes, are pruned with these statistics. The seconds
of a layer [rows, cols] are a fit to these measurements:

    a cols^3 + b rows cols^2 + c rows cols + d cols

The terms stand for factoring the Hessian, for updating weights, for choosing a mask with the block
solves, and for the constant cost of each column.

Setting weights to zero, memory: counted from the shapes, on top of what the process holds already;
see `forecast.memory`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.tune import TOKENS_PER_STEP, tune
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visits
from thanos_deploy.forecast import memory
from thanos_deploy.forecast.memory import Memory, Term
from thanos_deploy.machine import environment
from thanos_deploy.methods import NO_TUNING, Tuning, Walk
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.pruning.layers import gather, linear_shapes, short_names
from thanos_deploy.pruning.quantise import DAMPING, WALK
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.sensitivity import SHARE
from thanos_deploy.pruning.solution import aim, solve
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH
from thanos_deploy.shrink import cut
from thanos_deploy.shrink.options import Fit
from thanos_deploy.shrink.sizing import Plan
from thanos_deploy.solver.grid import Grid
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.quantise import quantise

# Multiplications of a trial pass through a block. They take a fraction of a second on any machine.
_TRIAL_PRODUCTS = 5e9

# Most rows and columns of the layer parts that are pruned in a trial. The first is nearly all
# factoring, whose share of the time grows fastest with the width.
_TRIAL_SIZES = ((64, 1024), (512, 512), (64, 512), (256, 256))

# Tuning steps of a trial. Tuning also judges the block before and after its steps; with this many
# steps, that takes about the same share of the time as with several hundred steps on more text.
_TRIAL_STEPS = 4

# The activity of the clock for one forward pass by itself.
_PASS = "pass"

# Runs of each trial; the first one is a warm-up.
_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """The time and the memory that pruning will take.

    Attributes:
        seconds: maps an activity to its seconds: "collect", "solve", "tune" and "forward" as in
            `layers.ACTIVITIES`; "survey" for a walk through the dense model before pruning;
            "quantize" for the walk afterwards.
        memory: peak memory of the process.
        token_seconds: seconds of one token in one dense block; for setting weights to zero, the
            statistics are included.
        basis: what the estimate is derived from, in words.
    """

    seconds: Mapping[str, float]
    memory: Memory
    token_seconds: float
    basis: str


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """The times of a trial walk, and the weight and statistics of each layer that it visited."""

    seconds: Mapping[str, float]
    layers: Mapping[str, tuple[Tensor, Statistics]]


@torch.no_grad()
def estimate(
    checkpoint: Checkpoint,
    segments: Tensor,
    recipe: Recipe,
    patterns: Mapping[str, Pattern],
    *,
    further: int = 0,
    grid: Grid | None = None,
    dtype: torch.dtype | None,
    device: torch.device,
    place: Place = "auto",
) -> Estimate:
    """Estimate what setting weights to zero takes, from a short trial; see the module.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        recipe: how the model is to be pruned. For structured pruning see `estimate_cutting`.
        patterns: maps the full name of each layer that is to be pruned to its pattern.
        further: number of segments that are used for tuning only.
        grid: grid that all layers are quantised to after pruning; None for no quantising.
        dtype: dtype of the stored weights; None to keep the dtype of each tensor.
        device: device that computes.
        place: where the calibration data is kept between two blocks.
    """
    resident, started = environment.resident_memory_bytes() or 0, time.perf_counter()
    blocks = len(checkpoint.blocks)
    # Short names of the layers that are pruned in at least one block; all blocks count alike.
    linears = short_names(checkpoint, patterns)
    visited = [
        block for block in checkpoint.blocks if not patterns.keys().isdisjoint(block.full_names)
    ]
    few = _few(checkpoint, segments)
    share = segments.numel() / few.numel()
    forward = DTYPES[recipe.forward_on(device)]
    ways = 1 + recipe.walks_dense
    trial = _walk(checkpoint, few, linears, recipe.walk, forward=forward, device=device)
    passing = further * segments.shape[1] / few.numel() * trial.seconds.get(_PASS, 0.0)
    steps = _tuning(trial.seconds, few, segments, recipe.walk.tune_steps)
    seconds = {
        "collect": len(visited) * share * trial.seconds["collect"],
        "solve": _solving(checkpoint, trial, recipe, patterns, forward),
        "tune": len(visited) * (steps + passing),
        "forward": (blocks - 1) * (share * trial.seconds.get("forward", 0.0) + passing),
    }
    if recipe.tries_layers:
        # The survey prunes every block once more, and passes a share of the data through the block
        # for each of its groups.
        passes = SHARE * (1 + len(checkpoint.blocks[0].groups))
        trying = len(visited) * share * passes * trial.seconds.get("forward", 0.0)
        again = seconds["collect"] + seconds["solve"] + seconds["forward"]
        seconds = {"survey": again + trying, **seconds}
    elif recipe.surveys:
        every = short_names(checkpoint, checkpoint.linears)
        survey = _walk(checkpoint, few, every, Walk(), forward=torch.float32, device=device)
        seconds = {"survey": blocks * share * sum(survey.seconds.values()), **seconds}
    if grid is not None:
        # Quantising is a second walk, always beside the model before it. It tunes every block as
        # pruning does.
        both = share * 2 / ways
        walked = both * trial.seconds["collect"] + steps + passing
        seconds["quantize"] = (
            blocks * walked
            + _fitted(checkpoint, trial, partial(_quantise, grid), checkpoint.linears, multiple=1)
            + (blocks - 1) * (both * trial.seconds.get("forward", 0.0) + passing)
        )
    spent = time.perf_counter() - started
    held = memory.of_recipe(
        checkpoint,
        segments,
        linears,
        recipe,
        further=further,
        dtype=dtype,
        device=device,
        place=place,
    )
    if grid is not None:
        quantising = memory.of_quantising(
            checkpoint,
            segments,
            recipe.walk,
            further=further,
            forward=forward,
            device=device,
            place=place,
        )
        held = memory.largest(held, quantising)
    return Estimate(
        seconds=seconds,
        memory=held.beside(resident),
        token_seconds=sum(
            spent for name, spent in trial.seconds.items() if name not in ("tune", _PASS)
        )
        / ways
        / few.numel(),
        basis=f"{few.numel()} tokens through two blocks, and parts of their layers, in "
        f"{spent:.1f} s on this machine",
    )


@torch.no_grad()
def estimate_cutting(
    checkpoint: Checkpoint,
    segments: Tensor,
    fit: Fit,
    surveyed: float,
    plan: Plan,
    *,
    tuning: Tuning = NO_TUNING,
    further: int = 0,
    device: torch.device,
) -> Estimate:
    """Estimate what cutting (structured pruning) takes, from a short trial; see the module.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        fit: how the remaining weights are refitted.
        surveyed: seconds that the survey took, which this process has already run.
        plan: the planned widths of each block.
        tuning: tuning steps of each block after it is cut.
        further: number of segments that are used for tuning only.
        device: device that computes.
    """
    started, blocks = time.perf_counter(), len(plan.kept)
    few = segments[: max(1, TOKENS_PER_BATCH // segments.shape[1])]
    share = segments.numel() / few.numel()
    # The widths of the median block stand for all blocks, except in a model with experts.
    kept = (plan.blocks[number] for number in plan.kept)
    after = sorted(kept, key=lambda block: block.parameters_after)[blocks // 2].after
    alike = checkpoint.family.experts is None
    few_steps = replace(tuning, tune_steps=min(_TRIAL_STEPS, tuning.tune_steps))

    def work(visit: Visit) -> None:
        width = after if alike else plan.widths[visit.index]
        cut.cut(visit, checkpoint, width, fit, few_steps)
        _pass(visit, few_steps)

    with_dense = fit.dense_target > 0.0 or tuning.tune_steps > 0
    trial = _quicker(visits(checkpoint, few, with_dense=with_dense, device=device), work)
    passing = further * segments.shape[1] / few.numel() * trial.get(_PASS, 0.0)
    steps = _tuning(trial, few, segments, tuning.tune_steps)
    spent = time.perf_counter() - started
    return Estimate(
        seconds={
            "survey": surveyed,
            "collect": blocks * share * trial.get("collect", 0.0),
            "solve": blocks * trial.get("solve", 0.0),
            **({"tune": blocks * (steps + passing)} if tuning.tune_steps else {}),
            "forward": (blocks - 1) * (share * trial.get("forward", 0.0) + passing),
        },
        memory=Memory(
            _held_on(device),
            (Term("this process at its peak", environment.peak_memory_bytes()),),
        ),
        token_seconds=trial.get("forward", 0.0) / (1 + with_dense) / few.numel(),
        basis=f"the survey of all blocks, and {few.numel()} tokens through two of them that were "
        f"cut, in {spent:.1f} s on this machine",
    )


def _few(checkpoint: Checkpoint, segments: Tensor) -> Tensor:
    """int64[count, length], few enough calibration tokens for one short pass through a block."""
    weights = math.prod(max(linear_shapes(checkpoint).values(), key=math.prod))
    linears = max(len(block.linears) for block in checkpoint.blocks)
    tokens = min(TOKENS_PER_BATCH, max(1, int(_TRIAL_PRODUCTS / (weights * linears))))
    length = min(segments.shape[1], tokens)
    return segments[: tokens // length, :length]


def _walk(
    checkpoint: Checkpoint,
    few: Tensor,
    linears: Collection[str],
    how: Walk,
    *,
    forward: torch.dtype,
    device: torch.device,
) -> _Trial:
    """Walk through two blocks without pruning them."""
    layers: dict[str, tuple[Tensor, Statistics]] = {}

    def work(visit: Visit) -> None:
        wanted = {visit.prefix + name for name in linears}
        for groups, statistics in gather(visit, wanted, how):
            layers.update(
                (name, (matrix(visit.block.get_submodule(name)).float(), statistics[group[0]]))
                for group in groups
                for name in group
            )
        if how.tune_steps:
            with visit.clock.measure("tune"):
                names = [name for name in visit.structure.linears if name in linears]
                tune(visit, names, min(_TRIAL_STEPS, how.tune_steps))
            _pass(visit, how)

    walk = visits(checkpoint, few, with_dense=how.with_dense, forward=forward, device=device)
    return _Trial(_quicker(walk, work), layers)


def _quicker(walk: Iterator[Visit], work: Callable[[Visit], object]) -> dict[str, float]:
    """Seconds by activity of work on one block: the minimum over the first two blocks."""
    clocks = []
    for visit in islice(walk, _REPEATS):
        work(visit)
        clocks.append(visit.clock.seconds)
    activities = {activity for clock in clocks for activity in clock}
    return {name: min(clock[name] for clock in clocks if name in clock) for name in activities}


def _pass(visit: Visit, how: Tuning) -> None:
    """Time one forward pass of the data through a block, if there is tuning.

    Segments that are used for tuning only pass each block this way.
    """
    if how.tune_steps:
        with visit.clock.measure(_PASS):
            for batch in visit.walk.batches:
                batch.forward(visit.index, visit.walk.block)


def _tuning(trial: Mapping[str, float], few: Tensor, segments: Tensor, steps: int) -> float:
    """Seconds of the tuning steps of one block, scaled from those of the trial."""
    tried, taken = (
        min(data.numel(), max(1, TOKENS_PER_STEP // data.shape[1]) * data.shape[1])
        for data in (few, segments)
    )
    return steps / max(1, min(_TRIAL_STEPS, steps)) * trial.get("tune", 0.0) * taken / tried


def _solving(
    checkpoint: Checkpoint,
    trial: _Trial,
    recipe: Recipe,
    patterns: Mapping[str, Pattern],
    forward: torch.dtype,
) -> float:
    """Seconds of the solver for all layers that are pruned."""
    method = methods.load(recipe.method)
    ((pattern, _),) = Counter(patterns.values()).most_common(1)

    def solve_part(weight: Tensor, statistics: Statistics) -> None:
        cols = weight.shape[1]
        cross = None if statistics.cross is None else statistics.cross[:cols, :cols]
        part = LayerProblem(weight, statistics.hessian[:cols, :cols], "trial", {}, forward)
        aimed, _ = aim(part, cross, recipe.walk.dense_target, recipe.options)
        solve(part, pattern, method, recipe.options, aimed=aimed)

    multiple = pattern.group if isinstance(pattern, SemiStructured) else 1
    return _fitted(checkpoint, trial, solve_part, patterns, multiple=multiple)


def _quantise(grid: Grid, weight: Tensor, statistics: Statistics) -> None:
    cols = weight.shape[1]
    hessian = statistics.hessian[:cols, :cols]
    cross = hessian if statistics.cross is None else statistics.cross[:cols, :cols]
    problem = LayerProblem(weight, hessian, "trial")
    quantise(problem, grid, DAMPING, cross=cross, fraction=WALK.dense_target)


def _fitted(
    checkpoint: Checkpoint,
    trial: _Trial,
    work: Callable[[Tensor, Statistics], None],
    layers: Collection[str],
    *,
    multiple: int,
) -> float:
    """Seconds of some work on all given layers, fitted to its times on parts of a few layers.

    Args:
        checkpoint: the model.
        trial: layers to take the parts from, with statistics.
        work: does the work; takes the weight of a part and the statistics of its whole layer.
        layers: full names of the layers that the work is to be done on.
        multiple: the number of columns of a part is a multiple of this.
    """
    terms, times = [], []
    for most_rows, most_cols in _TRIAL_SIZES:
        weight, statistics = max(
            trial.layers.values(),
            key=lambda layer: min(len(layer[0]), most_rows) * min(layer[0].shape[1], most_cols),
        )
        rows = min(len(weight), most_rows)
        cols = min(weight.shape[1], most_cols) // multiple * multiple
        seconds = math.inf
        for _ in range(_REPEATS):
            started = time.perf_counter()
            work(weight[:rows, :cols], statistics)
            seconds = min(seconds, time.perf_counter() - started)
        terms.append(_terms(rows, cols))
        times.append(seconds)
    # Minimise relative errors, so that small parts count as much as large ones.
    factors, _ = nnls(np.array(terms) / np.array(times)[:, None], np.ones(len(times)))
    shapes = linear_shapes(checkpoint)
    return float(sum(_terms(*shapes[name]) @ factors for name in layers))


def _terms(rows: int, cols: int) -> NDArray[np.float64]:
    return np.array([cols**3, rows * cols**2, rows * cols, cols], dtype=np.float64)


def _held_on(device: torch.device) -> tuple[Term, ...]:
    if device.type == "cpu":
        return ()
    return (Term("tensors, at most", torch.cuda.max_memory_allocated(device)),)
