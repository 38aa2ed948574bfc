"""The published figures of each pattern on GPUs, and the sentences about them.

The products among them also replace the roofline in `plan`.

The figures are worked out from the records of benchmarks/results/gpu; `python -m
benchmarks.gpu_figures` writes them to figures.json beside this file, which is installed with
the package. So a sentence about a GPU is that of a file, or "not measured (no GPU)". Standard
library only.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

from thanos_deploy.bundle.codec import loads
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.gpu.products import DENSE, KernelTime, beside_dense
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import GemmRow, HessianRow, ModelRow, PruningRow
from thanos_deploy.pattern import Pattern, SemiStructured, Structured

FILE = "figures.json"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a pruned model beside the same pass of the dense one, each with its best engine.

    Attributes:
        model: "2:4", "structured" or "structured, 2:4".
        dtype: "fp16" or "bf16".
        phase, batch, tokens: as of `rows.ModelRow`.
        parameters: of the dense model.
        removed: fraction of them that was cut out.
        dense_engine, engine: backend and variant that were fastest.
        dense_seconds, seconds: median of one pass.
    """

    model: str
    dtype: str
    phase: str
    batch: int
    tokens: int
    parameters: int
    removed: float
    dense_engine: str
    engine: str
    dense_seconds: float
    seconds: float

    @property
    def name(self) -> str:
        """What was timed, as benchmarks call it."""
        return f"{self.phase}-{self.batch}x{self.tokens}"

    @property
    def speed(self) -> float:
        """How many times as fast as the dense model."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product [tokens, inputs] x [inputs, outputs], dense and with a 2:4 weight.

    Attributes:
        dtype: "fp16" or "bf16".
        tokens, outputs, inputs: the sizes.
        dense_seconds: median of the dense product.
        kernel: the fastest for 2:4.
        seconds: its median.
    """

    dtype: str
    tokens: int
    outputs: int
    inputs: int
    dense_seconds: float
    kernel: str
    seconds: float

    @property
    def speed(self) -> float:
        """How many times as fast as the dense product."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer, pruned to 2:4 by Thanos.

    Attributes:
        preset: whose options were used.
        outputs, inputs: of the layer.
        seconds: of the solver.
    """

    preset: str
    outputs: int
    inputs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run showed of whole models, of matrix products, and of pruning.

    Attributes:
        card: name of the GPU.
        date, command: when and how it was measured.
        reasons: why the times are not to be trusted; empty for a valid run.
        passes: those that were timed with the dense model too.
        products: likewise.
        layers: that were pruned.
        gram_seconds: of a Hessian, for each token and squared number of inputs; None if none was
            summed up.
    """

    card: str
    date: str
    command: str
    reasons: tuple[str, ...]
    passes: tuple[Pass, ...]
    products: tuple[Product, ...]
    layers: tuple[LayerTime, ...] = ()
    gram_seconds: float | None = None


def figures(records: Records) -> Figures | None:
    """What a run showed; None for a rehearsal, and for a run that did not come to its card."""
    card = records.card
    if card is None or records.status == "REHEARSAL":
        return None
    fastest: dict[tuple[str, str, str, int, int, int], ModelRow] = {}
    for row in records.of(ModelRow):
        if row.seconds:
            key = (row.model, row.dtype, row.phase, row.batch, row.tokens, row.blocks)
            fastest[key] = min(row, fastest.get(key, row), key=lambda one: one.median)
    passes = tuple(
        Pass(
            model=row.model,
            dtype=row.dtype,
            phase=row.phase,
            batch=row.batch,
            tokens=row.tokens,
            parameters=dense.parameters,
            removed=1 - row.parameters / dense.parameters,
            dense_engine=dense.engine,
            engine=row.engine,
            dense_seconds=dense.median,
            seconds=row.median,
        )
        for (model, *where), row in fastest.items()
        if model != DENSE and (dense := fastest.get((DENSE, *where)))  # type: ignore[arg-type]
    )
    return Figures(
        card.name,
        card.date,
        card.command,
        records.reasons,
        passes,
        tuple(_products(records)),
        tuple(
            LayerTime(row.preset, row.outputs, row.inputs, row.seconds)
            for row in records.of(PruningRow)
            if row.seconds and (row.method, row.pattern) == ("thanos", "2:4")
        ),
        min(
            (row.seconds / (row.tokens * row.inputs**2) for row in records.of(HessianRow)),
            default=None,
        ),
    )


def _products(records: Records) -> Iterator[Product]:
    """The dense product and the fastest kernel for every weight and number of tokens."""
    times = (
        KernelTime(row.dtype, row.kernel, row.tokens, row.outputs, row.inputs, row.median)
        for row in records.of(GemmRow)
        if row.seconds
    )
    for dense, best in beside_dense(times):
        if best is not None:
            yield Product(
                dense.dtype,
                dense.tokens,
                dense.outputs,
                dense.inputs,
                dense.seconds,
                best.kernel,
                best.seconds,
            )


def to_json(runs: Sequence[Figures]) -> str:
    """The content of the published file."""
    return json.dumps([asdict(run) for run in runs], indent=1) + "\n"


def from_json(text: str) -> tuple[Figures, ...]:
    """What `to_json` wrote."""
    return tuple(
        Figures(
            **run
            | {
                "reasons": tuple(run["reasons"]),
                "passes": tuple(Pass(**one) for one in run["passes"]),
                "products": tuple(Product(**one) for one in run["products"]),
                "layers": tuple(LayerTime(**one) for one in run["layers"]),
            }
        )
        for run in loads(text)
    )


@cache
def published() -> tuple[Figures, ...]:
    """The figures of this version of the package, newest run first."""
    text = resources.files("thanos_deploy.gpu").joinpath(FILE).read_text(encoding="utf-8")
    return tuple(sorted(from_json(text), key=lambda run: run.date, reverse=True))


def measured_as(pattern: Pattern) -> str | None:
    """The model among the figures that a pattern makes; None for one that no GPU speeds up."""
    match pattern:
        case SemiStructured(2, 4):
            return "2:4"
        case Structured():
            return "structured"
    return None


def sentences(pattern: Pattern, *, card: str | None = None) -> Iterator[str]:
    """What was measured of a pattern, a sentence for each run; none if nothing was.

    Args:
        pattern: of a pruned model.
        card: on this GPU only; None for all.
    """
    model = measured_as(pattern)
    for run in published():
        passes = [one for one in run.passes if one.model == model]
        if passes and card in (None, run.card):
            yield _sentence(run, passes)


def on_gpu(pattern: Pattern) -> str:
    """The published figures of a pattern, or that there are none."""
    return " ".join(sentences(pattern)) or f"On a GPU: {NOT_MEASURED}."


def _sentence(run: Figures, passes: Sequence[Pass]) -> str:
    first = passes[0]
    cut = f", {first.removed:.0%} of the parameters cut out" if first.removed else ""
    times = "; ".join(
        f"{one.name} took {1e3 * one.seconds:.2f} ms on {one.engine}, dense "
        f"{1e3 * one.dense_seconds:.2f} ms on {one.dense_engine}, so {one.speed:.2f}x as fast"
        for one in passes
    )
    doubt = f" That run is INVALID ({'; '.join(run.reasons)})." if run.reasons else ""
    return (
        f"Measured on {run.card}, {run.date}, `{run.command}`: of a model of "
        f"{first.parameters / 1e9:.1f} billion parameters in {first.dtype}, {first.model}{cut}, "
        f"{times}.{doubt}"
    )
