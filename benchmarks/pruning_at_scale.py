"""What pruning a model would take on several H100s, from what one GPU took for single layers.

Usage: python -m benchmarks.pruning_at_scale MODEL RECORDS [--preset fast best] [--gpus 1 8]
           [--nodes 1 4] [--nsamples 128] [--seqlen 2048]

MODEL is a folder with a config.json, RECORDS a file of the GPU campaign with rows of the kinds
"pruning" (2:4) and "hessian". This is a simulation; nothing is pruned.

- Measured: the solver's seconds for a layer. They are fitted by a cols^3 + b rows cols^2 +
  c rows cols + d cols, and the fit is printed beside them; and the seconds of one Hessian, which
  grow with tokens x cols^2.
- As the code does it: which rank solves which rows (`ranks.spread`), how the segments are shared
  (`ranks.shards`), and the bytes that ranks exchange.
- From data sheets: the peak of bfloat16 products, of which forward and backward passes are assumed
  to reach 40 %; NVLink's 450 GB/s in each direction within a node, and 50 GB/s for each GPU
  between nodes (NVIDIA DGX H100: eight ConnectX-7 of 400 Gb/s).
- Assumed: three passes through a block where passes do not wait in it, for the pruned model and, by
  preset `best`, for the dense one.
- Left out: reading and writing the model, the host's work between products.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from thanos_deploy import methods
from thanos_deploy.forecast import datasheets
from thanos_deploy.gpu import records
from thanos_deploy.gpu.rows import HessianRow, PruningRow
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.progress import quietly
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.pruning.tune import TOKENS_PER_STEP
from thanos_deploy.ranks import spread
from thanos_deploy.ranks.shards import Layout
from thanos_deploy.ranks.spread import Job
from thanos_deploy.stages.plan import outline

_REACHED = 0.4
_PASSES = 3
_NVLINK, _NETWORK = 450e9, 50e9
_GPUS_OF_A_NODE = 8


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of the solver on one GPU: factors of cols^3, rows cols^2, rows cols and cols."""

    factors: tuple[float, float, float, float]

    @classmethod
    def fit(cls, rows: list[PruningRow]) -> "LayerCost":
        """The factors, none below 0, with which the relative errors are smallest."""
        measured = [(one.outputs, one.inputs, one.seconds) for one in rows if one.seconds]
        terms = np.array([_terms(outputs, inputs) / took for outputs, inputs, took in measured])
        factors, _ = nnls(terms, np.ones(len(measured)))
        a, b, c, d = (float(one) for one in factors)
        return cls((a, b, c, d))

    def factor(self, cols: int) -> float:
        """Of factoring a Hessian."""
        return self.factors[0] * cols**3

    def job(self, job: Job) -> float:
        """Of solving some rows when that is done."""
        return float(_terms(job.rows, job.cols)[1:] @ np.array(self.factors[1:]))

    def layer(self, rows: int, cols: int) -> float:
        """Of a layer by itself."""
        return self.factor(cols) + self.job(Job(0, rows, cols))


def _terms(rows: int, cols: int) -> NDArray[np.float64]:
    return np.array([cols**3, rows * cols**2, rows * cols, cols], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of a whole model, by what they go to."""

    statistics: float
    passes: float
    solver: float
    tuning: float
    exchange: float

    @property
    def total(self) -> float:
        """Of all."""
        return self.statistics + self.passes + self.solver + self.tuning + self.exchange


@dataclass(frozen=True, slots=True)
class Setting:
    """What is forecast: the GPUs, and the calibration data.

    Attributes:
        gpus: of all nodes together.
        nsamples, seqlen: segments, and tokens of each.
        cost: of the solver on one of the GPUs.
        gram: seconds of one Hessian for each token and squared input.
        peak: bfloat16 operations per second.
    """

    gpus: int
    nsamples: int
    seqlen: int
    cost: LayerCost
    gram: float
    peak: float

    @property
    def tokens(self) -> int:
        """Of the calibration data."""
        return self.nsamples * self.seqlen

    @property
    def bandwidth(self) -> float:
        """Bytes per second that one GPU sends to the others."""
        return _NVLINK if self.gpus <= _GPUS_OF_A_NODE else _NETWORK


def forecast(checkpoint: Checkpoint, walk: Walk, setting: Setting) -> Forecast:
    """Seconds that pruning to 2:4 takes; every block is taken for the first one."""
    shapes, block, gpus = linear_shapes(checkpoint), checkpoint.blocks[0], setting.gpus
    shards = Layout.of(setting.nsamples, setting.seqlen).shards
    share = math.ceil(shards / gpus) / shards  # of the data, that the busiest rank has
    ways = 1 + walk.with_dense
    statistics = solver = exchange = 0.0
    for step in block.steps:
        jobs: list[Job] = []
        for number, group in enumerate(step):
            cols = shapes[block.prefix + group[0]][1]
            sums = 1 + bool(walk.dense_target)
            # The Hessian is symmetric, so it takes half of what the cross-Gram matrix takes.
            statistics += share * setting.tokens * cols**2 * setting.gram * (2 * sums - 1)
            exchanged = 4 * sums * cols**2 * (math.ceil(shards / gpus) + 1) * (gpus - 1) / gpus
            exchange += exchanged / setting.bandwidth
            for name in group:
                rows = shapes[block.prefix + name][0]
                jobs += [
                    Job(number, part.stop - part.start, cols)
                    for part in spread.pieces(rows, "cuda")
                ]
                if gpus > 1:
                    exchange += 2 * rows * cols / setting.bandwidth
        solver += _slowest(jobs, setting)
    weights = sum(math.prod(shapes[block.prefix + name]) for name in block.linears)
    operations = 2 * weights * setting.tokens * _PASSES * ways * share
    steps = walk.tune_steps * 6 * weights * max(TOKENS_PER_STEP, setting.seqlen)
    parts = min(gpus, max(1, TOKENS_PER_STEP // setting.seqlen))
    if gpus > 1:
        exchange += walk.tune_steps * 2 * 4 * weights / setting.bandwidth
    times = len(checkpoint.blocks)
    reached = _REACHED * setting.peak
    return Forecast(
        statistics=times * statistics,
        passes=times * operations / reached,
        solver=times * solver,
        tuning=times * steps / parts / reached,
        exchange=times * exchange,
    )


def _slowest(jobs: list[Job], setting: Setting) -> float:
    """Seconds of the rank that solves longest."""
    busy = [0.0] * setting.gpus
    factored: set[tuple[int, int]] = set()
    for job, rank in zip(jobs, spread.owners(jobs, setting.gpus), strict=True):
        busy[rank] += setting.cost.job(job)
        if (rank, job.group) not in factored:
            factored.add((rank, job.group))
            busy[rank] += setting.cost.factor(job.cols)
    return max(busy)


def main() -> None:
    """Print the fit, and the forecasts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("records", type=Path)
    parser.add_argument("--preset", nargs="+", default=["fast", "best"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="of a node")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    arguments = parser.parse_args()
    found = records.read(arguments.records)
    print(f"{arguments.records.name}: {found.status}")
    gram = min(one.seconds / (one.tokens * one.inputs**2) for one in found.of(HessianRow))
    checkpoint = outline(arguments.model, revision=None, announce=quietly)
    for preset in arguments.preset:
        rows = [
            one
            for one in found.of(PruningRow)
            if (one.method, one.preset, one.pattern) == ("thanos", preset, "2:4")
        ]
        cost = LayerCost.fit(rows)
        for one in rows:
            if one.seconds:
                print(
                    f"{preset}: {one.outputs} x {one.inputs} took {one.seconds:.2f} s (measured); "
                    f"the fit says {cost.layer(one.outputs, one.inputs):.2f} s"
                )
        walk = methods.load("thanos").preset(preset).walk
        for gpus in sorted({one * many for one in arguments.gpus for many in arguments.nodes}):
            setting = Setting(
                gpus,
                arguments.nsamples,
                arguments.seqlen,
                cost,
                gram,
                datasheets.find("H100").peak["bf16"],
            )
            took = forecast(checkpoint, walk, setting)
            print(
                f"{preset}, {gpus:3} GPUs: {took.total / 60:6.1f} min (forecast): statistics "
                f"{took.statistics:.0f} s, passes {took.passes:.0f} s, solver {took.solver:.0f} s, "
                f"tuning {took.tuning:.0f} s, exchange {took.exchange:.0f} s"
            )


if __name__ == "__main__":
    main()
