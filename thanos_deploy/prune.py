"""Walk a model block by block: calibrate, prune, write back, go on with the pruned block.

Each block sees the calibration data as the already pruned blocks before it pass it on. Only one
block's weights are in memory at a time.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.artifact import Json
from thanos_deploy.calibrate import Statistics, collect
from thanos_deploy.checkpoint import Checkpoint, WeightsCopy, copy_companions
from thanos_deploy.hessian import retarget
from thanos_deploy.journal import Journal
from thanos_deploy.layer import LayerProblem
from thanos_deploy.linear import matrix
from thanos_deploy.methods import Method, Option
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.verdict import judge
from thanos_deploy.walk import Visit, visits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned linear layer, as it was written.

    Attributes:
        name: full name in the model.
        rows, cols: outputs and inputs.
        sparsity: fraction of zeros.
        pattern_holds: the written weight keeps the pattern everywhere.
        relative_error: fraction of the energy of the output that the layer aims at, on the
            calibration data, that the pruned weight misses.
        damping: what the method used.
        seconds: time that the method took.
    """

    name: str
    rows: int
    cols: int
    sparsity: float
    pattern_holds: bool
    relative_error: float
    damping: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block: its layers and where the time went.

    Attributes:
        layers: reports of its linear layers.
        seconds: time by activity: "collect", forward passes through the block as far as the
            layers, with statistics; "solve", the pruning method, all layers; "forward", the data on
            its way through the pruned block to the next one; "journal", keeping it on disk.
    """

    layers: tuple[LayerReport, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> Json:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Json) -> "BlockReport":
        """What `to_json` made the value of."""
        layers = tuple(LayerReport(**layer) for layer in value["layers"])
        return cls(layers, value["seconds"])


def prune(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path,
    *,
    pattern: Pattern,
    method: str,
    options: Mapping[str, Option],
    true_sequential: bool = False,
    dense_target: float = 0.0,
    dtype: torch.dtype | None = None,
    journal: Journal[BlockReport] | None = None,
    on_progress: OnProgress = silent,
) -> list[BlockReport]:
    """Prune every linear layer of every block and write an ordinary model folder.

    Embeddings, norms, biases and the output head are copied.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder for the pruned model.
        pattern: what to prune to.
        method: name of a method.
        options: the method's options.
        true_sequential: collect the statistics of each group of layers after the groups before it
            in the block are pruned, instead of all from the dense block.
        dense_target: how far each layer aims at the output that it has in the dense model rather
            than at its own output on the pruned model's inputs; see `hessian.retarget`.
        dtype: what to store, or None to keep each tensor's own.
        journal: where to keep every finished block; those that it has are not done again.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing, have NaN, or do not fit the pattern.
        HessianError: the calibration statistics cannot be used.
    """
    check(checkpoint, pattern=pattern, method=method, options=options)
    family, solver = checkpoint.family, methods.load(method)
    copy_companions(checkpoint.folder, destination, dtype)
    reports = [] if journal is None else journal.reports
    with torch.no_grad(), WeightsCopy(checkpoint.weights, destination, dtype) as copy:
        on_progress(len(reports), checkpoint.config.num_hidden_layers)
        for visit in visits(
            *(checkpoint, segments),
            copy=copy,
            with_dense=dense_target > 0.0,
            journal=journal,
        ):
            layers: list[LayerReport] = []
            for groups in (
                [[group] for group in family.inputs] if true_sequential else [family.inputs]
            ):
                with visit.clock.measure("collect"):
                    statistics = collect(visit.walk, [group[0] for group in groups], visit.dense)
                with visit.clock.measure("solve"):
                    layers += (
                        _prune_layer(
                            visit,
                            name,
                            statistics[group[0]],
                            pattern=pattern,
                            solver=solver,
                            options=options,
                            dense_target=dense_target,
                        )
                        for group in groups
                        for name in group
                    )
            reports.append(BlockReport(tuple(layers), visit.clock.seconds))
            logger.info(
                "block %d: largest relative error %.4f, %.1f s",
                visit.index,
                max(layer.relative_error for layer in layers),
                sum(visit.clock.seconds.values()),
            )
            on_progress(visit.index + 1, checkpoint.config.num_hidden_layers)
    return reports


def _prune_layer(
    visit: Visit,
    linear: str,
    statistics: Statistics,
    *,
    pattern: Pattern,
    solver: Method,
    options: Mapping[str, Option],
    dense_target: float,
) -> LayerReport:
    """Prune one layer in place.

    What the following layers and blocks see is what is written, rounding included.
    """
    started = time.perf_counter()
    name, weight = visit.prefix + linear, matrix(visit.block.get_submodule(linear))
    problem = LayerProblem(weight, statistics.hessian, name)
    if statistics.cross is not None:
        wanted = retarget(problem, statistics.cross, dense_target)
        problem = LayerProblem(wanted, statistics.hessian, name)
    result = solver.prune(problem, pattern, **options)
    seconds = time.perf_counter() - started
    weight.copy_(visit.stored(f"{linear}.weight", result.weight))
    verdict = judge((weight != 0).numpy(), pattern)
    return LayerReport(
        name=name,
        rows=weight.shape[0],
        cols=weight.shape[1],
        sparsity=verdict.sparsity,
        pattern_holds=verdict.holds,
        relative_error=result.relative_error,
        damping=result.damping,
        seconds=seconds,
    )


def check(
    checkpoint: Checkpoint, *, pattern: Pattern, method: str, options: Mapping[str, Option]
) -> None:
    """Refuse, before anything is computed, layers that the method cannot prune.

    Raises:
        ModelError: a layer is missing or does not fit the pattern.
        UsageError: the options do not fit the method or the pattern.
    """
    refuse = methods.load(method).check
    for name, (_, cols) in linear_shapes(checkpoint).items():
        refuse(name, cols, pattern, **options)


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
