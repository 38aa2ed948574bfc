"""Forecast what pruning a model to 2:4 takes on GPUs, from measured times of single layers.

- Measured on one GPU: the solver's seconds for a layer, to which a cols^3 + b rows cols^2 +
  c rows cols + d cols is fitted; and the seconds of one Hessian, which grow with tokens x cols^2.
- Computed as the code does it: which rank solves which rows (`ranks.schedule`), how segments are
  shared among ranks (`ranks.shards`), the bytes that ranks exchange, and the peak memory
  (`forecast.memory`).
- From data sheets: the peak of bfloat16 products, of which forward and backward passes are assumed
  to reach 40 %; NVLink's 450 GB/s in each direction within a node; and 50 GB/s for each GPU
  between nodes (NVIDIA DGX H100: eight ConnectX-7 of 400 Gb/s).
- Assumed: forward passes do not wait inside a block, so each block takes three of them. With preset
  `best`, the dense model takes as many.
- Left out: reading and writing the model, and the host's work between products.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from thanos_deploy import methods
from thanos_deploy.calibration.tune import TOKENS_PER_STEP
from thanos_deploy.errors import UsageError
from thanos_deploy.forecast import memory
from thanos_deploy.forecast.datasheets import Datasheet
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu.figures import LayerTime
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.layers import linear_shapes, short_names
from thanos_deploy.ranks import schedule
from thanos_deploy.ranks.schedule import Job
from thanos_deploy.ranks.shards import Layout

PRESETS = ("fast", "best")

_REACHED = 0.4
_PASSES = 3
_NVLINK, _NETWORK = 450e9, 50e9
_GPUS_OF_A_NODE = 8


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of the solver on one GPU, as a function of a layer's size.

    Attributes:
        factors: coefficients of cols^3, rows cols^2, rows cols and cols.
    """

    factors: tuple[float, float, float, float]

    @classmethod
    def fit(cls, measured: Sequence[LayerTime]) -> "LayerCost":
        """Fit the coefficients to measured times, by least squares of the relative errors.

        No coefficient is negative. Every subset of the four terms is fitted, and the best fit
        without a negative coefficient is taken.
        """
        terms = np.array([_terms(one.outputs, one.inputs) / one.seconds for one in measured])
        best, least = np.zeros(4), float(len(measured))
        for count in range(1, 5):
            for chosen in combinations(range(4), count):
                columns = list(chosen)
                # Scale the columns to norm 1, or lstsq would treat small ones as zero.
                sizes = np.linalg.norm(terms[:, columns], axis=0)
                found, *_ = np.linalg.lstsq(terms[:, columns] / sizes, np.ones(len(measured)))
                error = float(np.square(terms[:, columns] / sizes @ found - 1).sum())
                if (found >= 0).all() and error < least * (1 - 1e-9):
                    best, least = np.zeros(4), error
                    best[columns] = found / sizes
        a, b, c, d = (float(one) for one in best)
        return cls((a, b, c, d))

    def factor(self, cols: int) -> float:
        """Seconds of factoring a Hessian [cols, cols]."""
        return self.factors[0] * cols**3

    def job(self, job: Job) -> float:
        """Seconds of solving a job, whose Hessian has been factored."""
        return float(_terms(job.rows, job.cols)[1:] @ np.array(self.factors[1:]))

    def layer(self, rows: int, cols: int) -> float:
        """Seconds of a whole layer, factoring included."""
        return self.factor(cols) + self.job(Job(0, 0, rows, cols))


def _terms(rows: int, cols: int) -> NDArray[np.float64]:
    return np.array([cols**3, rows * cols**2, rows * cols, cols], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Setting:
    """The GPUs and the calibration data of a forecast.

    Attributes:
        gpus: number of GPUs on all nodes together.
        nsamples, seqlen: number of calibration segments, and tokens in each.
        cost: times of the solver on one of the GPUs.
        gram: seconds of one Hessian, divided by tokens x inputs^2.
        peak: dense bfloat16 operations per second of one GPU.
    """

    gpus: int
    nsamples: int
    seqlen: int
    cost: LayerCost
    gram: float
    peak: float

    @property
    def tokens(self) -> int:
        """Number of tokens in the calibration data."""
        return self.nsamples * self.seqlen

    @property
    def bandwidth(self) -> float:
        """Bytes per second that one GPU can send to the others."""
        return _NVLINK if self.gpus <= _GPUS_OF_A_NODE else _NETWORK


@dataclass(frozen=True, slots=True)
class PruningForecast:
    """The time and memory that pruning a whole model to 2:4 takes.

    Attributes:
        preset: preset of the method Thanos.
        gpus: number of GPUs.
        nsamples, seqlen: number of calibration segments, and tokens in each.
        seconds: seconds by activity: "statistics", "passes", "solver", "tuning" and "exchange".
        total_seconds: sum of these seconds.
        device_bytes, host_bytes: peak memory of each GPU and of its process, with the calibration
            data between two blocks on disk.
        fits: whether the GPU has `device_bytes` of memory.
        basis: the measurements behind the forecast, and the largest error of the fit to them.
    """

    preset: str
    gpus: int
    nsamples: int
    seqlen: int
    seconds: Mapping[str, float]
    total_seconds: float
    device_bytes: int
    host_bytes: int
    fits: bool
    basis: str


def plan(
    checkpoint: Checkpoint, gpu: Datasheet, *, gpus: int, nsamples: int, seqlen: int
) -> tuple[PruningForecast, ...]:
    """Forecast what pruning a model to 2:4 takes with each of `PRESETS`.

    Args:
        checkpoint: the model; only its sizes count.
        gpu: the GPU of each rank.
        gpus: number of ranks, each with one GPU.
        nsamples, seqlen: number of calibration segments, and tokens in each.

    Raises:
        UsageError: no published run has measured the solver on that GPU, or there are more GPUs
            than shards of calibration data.
    """
    Layout.of(nsamples, seqlen).require(gpus)
    run = next(
        (one for one in gpu_figures.published() if one.card == gpu.product and one.layers), None
    )
    if run is None or run.gram_seconds is None:
        known = {one.card for one in gpu_figures.published() if one.layers}
        raise UsageError(
            f"pruning on {gpu.name} cannot be forecast, because the published measurements "
            "have no layer that was pruned on it",
            fix=f"use a GPU that has such measurements: {', '.join(sorted(known)) or 'none yet'}",
        )
    return tuple(
        _of_preset(checkpoint, preset, gpu, gpus, nsamples, seqlen, run.layers, run.gram_seconds)
        for preset in PRESETS
    )


def _of_preset(
    checkpoint: Checkpoint,
    preset: str,
    gpu: Datasheet,
    gpus: int,
    nsamples: int,
    seqlen: int,
    layers: Sequence[LayerTime],
    gram: float,
) -> PruningForecast:
    measured = [one for one in layers if one.preset == preset]
    cost = LayerCost.fit(measured)
    walk = methods.load("thanos").preset(preset).walk
    setting = Setting(gpus, nsamples, seqlen, cost, gram, gpu.peak["bf16"])
    seconds = of_walk(checkpoint, walk, setting)
    held = memory.of_pruning(
        checkpoint,
        torch.empty(nsamples, seqlen, dtype=torch.int64, device="meta"),
        short_names(checkpoint, checkpoint.linears),
        walk,
        further=walk.further(nsamples),
        forward=torch.bfloat16,
        dtype=None,
        device=torch.device("cuda"),
        place="disk",
    )
    furthest = max(abs(cost.layer(one.outputs, one.inputs) / one.seconds - 1) for one in measured)
    sizes = ", ".join(f"{one.outputs} x {one.inputs} in {one.seconds:.2f} s" for one in measured)
    return PruningForecast(
        preset=preset,
        gpus=gpus,
        nsamples=nsamples,
        seqlen=seqlen,
        seconds=seconds,
        total_seconds=sum(seconds.values()),
        device_bytes=held.device_bytes,
        host_bytes=held.host_bytes,
        fits=held.device_bytes <= gpu.memory,
        basis=f"measured on one {gpu.product}: {sizes}. The fit is at most "
        f"{furthest:.0%} off for these {len(measured)} layers; times of other sizes and of "
        "everything else are computed",
    )


def of_walk(checkpoint: Checkpoint, walk: Walk, setting: Setting) -> dict[str, float]:
    """Seconds of pruning to 2:4 by activity; every block counts like the first one.

    Args:
        checkpoint: the model; only its sizes count.
        walk: options of the walk through the model.
        setting: the GPUs and the calibration data.
    """
    shapes, block, gpus = linear_shapes(checkpoint), checkpoint.blocks[0], setting.gpus
    shards = Layout.of(setting.nsamples, setting.seqlen).shards
    share = math.ceil(shards / gpus) / shards  # fraction of the data that the busiest rank has
    ways = 1 + walk.with_dense
    statistics = solver = exchange = 0.0
    for step in block.steps:
        jobs: list[Job] = []
        for number, group in enumerate(step):
            cols = shapes[block.prefix + group[0]][1]
            sums = 1 + bool(walk.dense_target)
            # The Hessian is symmetric, so it takes half the time of the cross-Gram matrix.
            statistics += share * setting.tokens * cols**2 * setting.gram * (2 * sums - 1)
            exchanged = 4 * sums * cols**2 * (math.ceil(shards / gpus) + 1) * (gpus - 1) / gpus
            exchange += exchanged / setting.bandwidth
            for name in group:
                rows = shapes[block.prefix + name][0]
                layer = len({job.layer for job in jobs})
                jobs += [
                    Job(number, layer, part.stop - part.start, cols)
                    for part in schedule.pieces(rows, "cuda")
                ]
                if gpus > 1:
                    exchange += 2 * rows * cols / setting.bandwidth
        solver += _slowest(jobs, setting)
    weights = sum(math.prod(shapes[block.prefix + name]) for name in block.linears)
    # Segments that are used for tuning only pass each model once.
    further = walk.further(setting.nsamples)
    layout = Layout.of(setting.nsamples, setting.seqlen, further)
    alone = 1 + max(batch.shard for batch in layout.batches) - shards
    busiest = math.ceil(alone / gpus) / max(1, alone)
    passed = setting.tokens * _PASSES * share + further * setting.seqlen * busiest
    operations = 2 * weights * ways * passed
    steps = walk.tune_steps * 6 * weights * max(TOKENS_PER_STEP, setting.seqlen)
    parts = min(gpus, max(1, TOKENS_PER_STEP // setting.seqlen))
    if gpus > 1:
        exchange += walk.tune_steps * 2 * 4 * weights / setting.bandwidth
    times = len(checkpoint.blocks)
    reached = _REACHED * setting.peak
    return {
        "statistics": times * statistics,
        "passes": times * operations / reached,
        "solver": times * solver,
        "tuning": times * steps / parts / reached,
        "exchange": times * exchange,
    }


def _slowest(jobs: list[Job], setting: Setting) -> float:
    """Seconds of the slowest rank."""
    busy = [0.0] * setting.gpus
    factored: set[tuple[int, int]] = set()
    for job, rank in zip(jobs, schedule.owners(jobs, setting.gpus), strict=True):
        busy[rank] += setting.cost.job(job)
        if (rank, job.group) not in factored:
            factored.add((rank, job.group))
            busy[rank] += setting.cost.factor(job.cols)
    return max(busy)
