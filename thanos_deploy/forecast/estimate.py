"""Estimate the seconds and the memory that pruning a model will take on this machine.

Of cutting: the survey, which has been walked by then, took what it will take again; two blocks are
cut with as many tokens as pass at once, which makes solving no quicker; and this process has held
by then what cutting holds.

Of everything else, the seconds: two blocks are walked with few tokens, as pruning walks them, which
gives what collecting statistics and going on to the next block take of a token; and leading parts
of their layers, of several sizes, are pruned with these statistics. What a layer of [rows, cols]
takes is fitted to the latter by

    a cols^3 + b rows cols^2 + c rows cols + d cols

for factoring, for updating, for choosing and block solves, and for what each column costs.

And the memory: counted from the shapes, on top of what the process holds already; see
`forecast.memory`.
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
from thanos_deploy.pruning.quantise import DAMPING
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

# Multiplications of a trial pass through a block: a fraction of a second on any machine.
_TRIAL_PRODUCTS = 5e9

# The parts that are pruned have at most so many rows and columns. The first is nearly all
# factoring, whose share grows fastest with the width.
_TRIAL_SIZES = ((64, 1024), (512, 512), (64, 512), (256, 256))

# Steps that blocks are tuned with: so many that judging a block before and after is about the share
# of it that it is of several hundred steps on more text.
_TRIAL_STEPS = 4

# What is measured of a pass by itself.
_PASS = "pass"

# The first time is a warm-up.
_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """What pruning will take.

    Attributes:
        seconds: by activity: "collect", "solve", "tune" and "forward" as in `layers.ACTIVITIES`;
            "survey", the walk before, of OWL or of cutting; "quantize", the walk afterwards.
        memory: the most that the process will hold.
        token_seconds: one token on its way through one dense block, statistics included.
        basis: what this is derived from.
    """

    seconds: Mapping[str, float]
    memory: Memory
    token_seconds: float
    basis: str


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What a walk with few tokens took, and what it saw of the last block's layers."""

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
    """Measure pruning for a moment, and estimate the whole from it.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        recipe: how it is to be pruned; for what is to be cut see `estimate_cutting`.
        patterns: of the layers that are to be pruned, by full name.
        further: segments that blocks are only tuned on.
        grid: what all layers are to be quantised to afterwards; None for nothing.
        dtype: what is to be stored; None for each tensor's own.
        device: where it is to be done.
        place: where the calibration data is to wait between two blocks.
    """
    resident, started = environment.resident_memory_bytes() or 0, time.perf_counter()
    blocks = len(checkpoint.blocks)
    # What is pruned of any block stands for all.
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
        # Once more, and a part of the data through a block for each of its groups.
        passes = SHARE * (1 + len(checkpoint.blocks[0].groups))
        trying = len(visited) * share * passes * trial.seconds.get("forward", 0.0)
        again = seconds["collect"] + seconds["solve"] + seconds["forward"]
        seconds = {"survey": again + trying, **seconds}
    elif recipe.surveys:
        every = short_names(checkpoint, checkpoint.linears)
        survey = _walk(checkpoint, few, every, Walk(), forward=torch.float32, device=device)
        seconds = {"survey": blocks * share * sum(survey.seconds.values()), **seconds}
    if grid is not None:
        # A walk of its own, whose blocks are tuned like those that were pruned.
        walked = share * trial.seconds["collect"] + steps + passing
        seconds["quantize"] = (
            blocks * walked
            + _fitted(checkpoint, trial, partial(_quantise, grid), checkpoint.linears, multiple=1)
            + (blocks - 1) * (share * trial.seconds.get("forward", 0.0) + passing)
        )
    spent = time.perf_counter() - started
    return Estimate(
        seconds=seconds,
        memory=memory.of_recipe(
            checkpoint,
            segments,
            linears,
            recipe,
            further=further,
            dtype=dtype,
            device=device,
            place=place,
        ).beside(resident),
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
    """Measure cutting for a moment, and estimate the whole from it.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        fit: how what is left is to be refitted.
        surveyed: seconds that the survey before it took this process.
        plan: the widths of each block.
        tuning: steps of what is left of a block.
        further: segments that blocks are only tuned on.
        device: where it is to be done.
    """
    started, blocks = time.perf_counter(), len(plan.kept)
    few = segments[: max(1, TOKENS_PER_BATCH // segments.shape[1])]
    share = segments.numel() / few.numel()
    # What becomes of one block stands for all, where they are alike.
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
    """int64[count, length]: so few calibration tokens that a block is passed at once."""
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
    """Walk two blocks and prune nothing."""
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
    """Seconds by activity that working on two blocks takes, of which the quicker counts."""
    clocks = []
    for visit in islice(walk, _REPEATS):
        work(visit)
        clocks.append(visit.clock.seconds)
    activities = {activity for clock in clocks for activity in clock}
    return {name: min(clock[name] for clock in clocks if name in clock) for name in activities}


def _pass(visit: Visit, how: Tuning) -> None:
    """Measure one pass of the data through a block, if segments may be only tuned on."""
    if how.tune_steps:
        with visit.clock.measure(_PASS):
            for batch in visit.walk.batches:
                batch.forward(visit.index, visit.walk.block)


def _tuning(trial: Mapping[str, float], few: Tensor, segments: Tensor, steps: int) -> float:
    """Seconds that the steps take for a block."""
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
    """Seconds that the solver takes for all layers."""
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
    quantise(LayerProblem(weight, statistics.hessian[:cols, :cols], "trial"), grid, DAMPING)


def _fitted(
    checkpoint: Checkpoint,
    trial: _Trial,
    work: Callable[[Tensor, Statistics], None],
    layers: Collection[str],
    *,
    multiple: int,
) -> float:
    """Seconds that work on layers takes, from what it takes on leading parts of some.

    Args:
        checkpoint: the model.
        trial: the layers that are tried, with statistics.
        work: on the weight of a part, and the statistics of its whole layer.
        layers: full names of those that are to be worked on.
        multiple: that divides the columns of a part.
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
    # Relative errors count, so that the small parts do as well.
    factors, _ = nnls(np.array(terms) / np.array(times)[:, None], np.ones(len(times)))
    shapes = linear_shapes(checkpoint)
    return float(sum(_terms(*shapes[name]) @ factors for name in layers))


def _terms(rows: int, cols: int) -> NDArray[np.float64]:
    return np.array([cols**3, rows * cols**2, rows * cols, cols], dtype=np.float64)


def _held_on(device: torch.device) -> tuple[Term, ...]:
    if device.type == "cpu":
        return ()
    return (Term("tensors, at most", torch.cuda.max_memory_allocated(device)),)
