"""Walk a model block by block: calibrate, prune, write back, go on with the pruned block.

Each block sees the calibration data as the already pruned blocks before it pass it on. Only one
block's weights are in memory at a time.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.calibration.blocks import collect
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.walk import Visit, visits
from thanos_deploy.machine import devices, environment
from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import products_in
from thanos_deploy.methods import Option
from thanos_deploy.model.assignment import DENSE, every
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.verdict import judge
from thanos_deploy.model.weights import WeightsCopy
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.prune.result import PrunedBlock, PrunedLayer
from thanos_deploy.prune.solution import aim, solve
from thanos_deploy.prune.tune import tune
from thanos_deploy.solver.layer import Factor, LayerProblem

# So much freed memory is worth the time that it takes to get it anew.
_FREED_BYTES = 128 << 20

logger = logging.getLogger(__name__)


# What a block's time goes to: forward passes as far as the layers, with statistics; the pruning
# method, all layers; steps of all of them together; the data on its way through the pruned block to
# the next one; keeping it on disk.
ACTIVITIES = ("collect", "solve", "tune", "forward", "journal")


def prune(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path,
    *,
    pattern: Pattern | Mapping[str, Pattern],
    method: str,
    options: Mapping[str, Option],
    true_sequential: bool = False,
    dense_target: float = 0.0,
    tune_steps: int = 0,
    calib_forward: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    journal: Journal[PrunedBlock] | None = None,
    on_progress: OnProgress = silent,
) -> list[PrunedBlock]:
    """Prune the linear layers of every block and write an ordinary model folder.

    Embeddings, norms, biases and the output head are copied, and so are layers without a pattern.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder for the pruned model.
        pattern: what to prune every layer to; or what each layer, by its full name.
        method: name of a method.
        options: the method's options.
        true_sequential: collect the statistics of each group of layers after the groups before it
            in the block are pruned, instead of all from the dense block.
        dense_target: how far each layer aims at the output that it has in the dense model rather
            than at its own output on the pruned model's inputs; see `hessian.retarget`.
        tune_steps: steps of all pruned layers of a block together; see `tune.tune`.
        calib_forward: the dtype in which blocks run, float32 or bfloat16.
        dtype: what to store, or None to keep each tensor's own.
        device: where each block is while it is pruned.
        journal: where to keep every finished block; those that it has are not done again.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing, have NaN, or do not fit the pattern.
        ResourceError: a block does not fit into the GPU's memory.
    """
    check(checkpoint, pattern=pattern, method=method, options=options)
    patterns = every(checkpoint.linears, pattern)
    copy_companions(checkpoint.folder, destination, dtype)
    reports = [] if journal is None else journal.reports
    with (
        torch.no_grad(),
        products_in(torch.float32),
        WeightsCopy(checkpoint.weights, destination, dtype) as copy,
    ):
        on_progress(len(reports), checkpoint.config.num_hidden_layers)
        for visit in visits(
            checkpoint,
            segments,
            copy=copy,
            with_dense=dense_target > 0.0 or tune_steps > 0,
            forward=calib_forward,
            journal=journal,
            device=device,
        ):
            with devices.memory_for(f"block {visit.index}"):
                layers = _prune_block(
                    visit,
                    patterns,
                    method=method,
                    options=options,
                    true_sequential=true_sequential,
                    dense_target=dense_target,
                    tune_steps=tune_steps,
                    products=calib_forward,
                )
            reports.append(PrunedBlock(layers, visit.clock.seconds))
            logger.info(
                "block %d: largest relative error %.4f, %.1f s",
                visit.index,
                max(layer.relative_error for layer in layers),
                sum(visit.clock.seconds.values()),
            )
            on_progress(visit.index + 1, checkpoint.config.num_hidden_layers)
    return reports


def _prune_block(
    visit: Visit,
    patterns: Mapping[str, Pattern],
    *,
    method: str,
    options: Mapping[str, Option],
    true_sequential: bool,
    dense_target: float,
    tune_steps: int,
    products: torch.dtype,
) -> tuple[PrunedLayer, ...]:
    """Prune, in place, the linear layers of a block; their reports in the order of the forward."""
    layers: dict[str, PrunedLayer] = {}
    for groups, statistics in gather(
        visit,
        patterns,
        true_sequential=true_sequential,
        with_dense=dense_target > 0.0,
    ):
        with visit.clock.measure("solve"):
            for group in groups:
                # What glibc takes from the system would be beside what it has kept of freed memory.
                if 8 * statistics[group[0]].hessian.numel() > environment.HEAP_TENSOR_BYTES:
                    environment.return_freed_memory()
                layers |= _prune_group(
                    visit,
                    group,
                    statistics.pop(group[0]),
                    patterns=patterns,
                    method=method,
                    options=options,
                    dense_target=dense_target,
                    products=products,
                )
            environment.return_freed_memory(at_least=_FREED_BYTES)
    if tune_steps and layers:
        with visit.clock.measure("tune"):
            tune(visit, layers, tune_steps)
            layers = {
                name: _judged_again(visit, name, report, patterns[report.name])
                for name, report in layers.items()
            }
    return tuple(
        layers[name] if name in layers else _leave_dense(visit, name)
        for name in visit.structure.linears
    )


def gather(
    visit: Visit,
    layers: Collection[str],
    *,
    true_sequential: bool,
    with_dense: bool,
) -> Iterator[tuple[list[list[str]], dict[str, Statistics]]]:
    """The groups of a block's layers that are pruned at a time, and their inputs' statistics.

    A group is what reads one input, seen from the block; its first layer's name is the statistics'.
    They are collected when their turn comes.

    Args:
        visit: the block.
        layers: full names of the layers that are to be pruned.
        true_sequential: a group at a time, or that group of every expert, instead of all.
        with_dense: with `Statistics.cross`, but for layers of experts.
    """
    steps = [
        [
            names
            for group in step
            if (names := [name for name in group if visit.prefix + name in layers])
        ]
        for step in visit.structure.steps
    ]
    steps = [step for step in steps if step]
    turns = steps if true_sequential else [[group for step in steps for group in step]]
    for turn, together in enumerate(turns, start=1):
        if together:
            with visit.clock.measure("collect"):
                statistics = collect(
                    visit.walk,
                    [group[0] for group in together],
                    visit.dense if with_dense else None,
                    pause=true_sequential and visit.can_wait,
                    last=turn == len(turns),
                    routed=visit.structure.routed,
                )
            yield together, statistics


def _prune_group(
    visit: Visit,
    group: Sequence[str],
    statistics: Statistics,
    *,
    patterns: Mapping[str, Pattern],
    method: str,
    options: Mapping[str, Option],
    dense_target: float,
    products: torch.dtype,
) -> dict[str, PrunedLayer]:
    """Prune, in place, layers that read the same input; their reports by name, seen from the block.

    What the following layers and blocks see is what is written, rounding included.
    """
    weights = [matrix(visit.block.get_submodule(linear)) for linear in group]
    # Of a wide layer it is as large as its Hessian, so it is kept only if it is needed again.
    again = len(group) > 1 or statistics.cross is not None
    factors: dict[tuple[float, str], Factor] | None = {} if again else None
    aimed: Sequence[Tensor | None] = [None] * len(group)
    hessian = statistics.hessian
    failures: tuple[str, ...] = ()
    if not statistics.mass:  # an expert to which the router sent nothing
        hessian = torch.eye(len(hessian), device=hessian.device)
        failures = ("no token of the calibration text reached it, so all inputs count alike",)
    if statistics.cross is not None:
        together = LayerProblem(
            torch.cat(weights).float(), hessian, visit.prefix + group[0], factors
        )
        wanted, failures = aim(together, statistics.cross, dense_target, options)
        if wanted is not None:
            aimed = wanted.split([len(weight) for weight in weights])
    reports = {}
    for linear, dense, target in zip(group, weights, aimed, strict=True):
        started = time.perf_counter()
        name = visit.prefix + linear
        solution = solve(
            LayerProblem(dense.float(), hessian, name, factors, products),
            patterns[name],
            method=method,
            options=options,
            aimed=target,
            failures=failures,
        )
        seconds = time.perf_counter() - started
        weight = visit.write(linear, solution.result.weight)
        verdict = judge(weight != 0, patterns[name])
        reports[linear] = PrunedLayer(
            name=name,
            rows=weight.shape[0],
            cols=weight.shape[1],
            pattern=str(patterns[name]),
            sparsity=verdict.sparsity,
            pattern_holds=verdict.holds,
            relative_error=solution.result.relative_error,
            damping=solution.result.damping,
            solver=solution.solver,
            failures=solution.failures,
            seconds=seconds,
        )
    return reports


def _judged_again(visit: Visit, linear: str, report: PrunedLayer, pattern: Pattern) -> PrunedLayer:
    """The report of a layer whose weight has changed since."""
    verdict = judge(matrix(visit.block.get_submodule(linear)) != 0, pattern)
    return replace(report, sparsity=verdict.sparsity, pattern_holds=verdict.holds)


def _leave_dense(visit: Visit, linear: str) -> PrunedLayer:
    """Have one layer written as it was, to the last bit."""
    visit.untouched.add(f"{linear}.weight")
    # In another dtype it is rounded.
    weight = visit.write(linear, matrix(visit.block.get_submodule(linear)))
    return PrunedLayer(
        name=visit.prefix + linear,
        rows=weight.shape[0],
        cols=weight.shape[1],
        pattern=DENSE,
        sparsity=1.0 - int(weight.count_nonzero()) / weight.numel(),
        pattern_holds=True,
        relative_error=0.0,
        damping=0.0,
        solver="none",
        failures=(),
        seconds=0.0,
    )


def check(
    checkpoint: Checkpoint,
    *,
    pattern: Pattern | Mapping[str, Pattern],
    method: str,
    options: Mapping[str, Option],
) -> None:
    """Refuse, before anything is computed, layers that the method cannot prune.

    Raises:
        ModelError: a layer is missing or does not fit the pattern.
        UsageError: the options do not fit the method or the pattern.
    """
    refuse, shapes = methods.load(method).check, linear_shapes(checkpoint)
    for name, its in every(shapes, pattern).items():
        refuse(name, shapes[name][1], its, **options)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Full name -> (rows, cols) of every linear layer that pruning visits, from the headers.

    Raises:
        ModelError: the weights lack one.
    """
    shapes = {}
    for name in checkpoint.linears:
        rows, cols = checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight")]
        shapes[name] = (cols, rows) if checkpoint.family.transposed else (rows, cols)
    return shapes
