"""The published GPU figures of each pattern, and the sentences about them.

`plan` also uses the measured matrix products, in place of the roofline.

`python -m benchmarks.gpu_figures` computes the figures from the records in benchmarks/results/gpu
and writes them to figures.json beside this file, which is installed with the package. So every
sentence about a GPU is based on a record, or it says "not measured (no GPU)". Standard library
only.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.gpu.products import DENSE, KernelTime, beside_dense
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import GemmRow, HessianRow, ModelRow, PruningRow
from thanos_deploy.pattern import Pattern, SemiStructured, Structured

FILE = "figures.json"


@dataclass(frozen=True, slots=True)
class Pass:
    """One prefill or decode step of a pruned and of the dense model, each with its fastest engine.

    Attributes:
        model: "2:4", "structured" or "structured, 2:4".
        dtype: "fp16" or "bf16".
        phase, batch, tokens: see `rows.ModelRow`.
        parameters: number of parameters of the dense model.
        removed: fraction of these parameters that was cut out.
        dense_engine, engine: fastest backend and variant for each model.
        dense_seconds, seconds: median time of one pass of each model.
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
        """Name of the pass, as in benchmarks: "decode-1x512"."""
        return f"{self.phase}-{self.batch}x{self.tokens}"

    @property
    def speed(self) -> float:
        """Speed relative to the dense model."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product [tokens, inputs] x [inputs, outputs], dense and with a 2:4 weight.

    Attributes:
        dtype: "fp16" or "bf16".
        tokens, outputs, inputs: sizes of the product.
        dense_seconds: median time of the dense product.
        kernel: the fastest kernel for the 2:4 weight.
        seconds: median time of that kernel.
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
        """Speed relative to the dense product."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Time that Thanos takes to prune one layer to 2:4.

    Attributes:
        preset: preset whose options were used.
        outputs, inputs: rows and columns of the layer's weight.
        seconds: time of the solver.
    """

    preset: str
    outputs: int
    inputs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one run: passes of whole models, matrix products, and pruning.

    Attributes:
        card: name of the GPU.
        date, command: date of the run, and the command that made it.
        reasons: why the times are not to be trusted; empty for a VALID run.
        passes: passes of pruned models for which the dense model was timed too.
        products: matrix products for which the dense kernel was timed too.
        layers: times of pruning single layers.
        gram_seconds: time of accumulating a Hessian, divided by the number of tokens and by the
            square of the number of inputs; None if it was not measured.
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
    """Compute the figures of a run; None for a rehearsal or a run that does not name its GPU."""
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
    """Yield the dense and the fastest other product for every weight and number of tokens."""
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
    """Return the content of figures.json."""
    return json.dumps([encode(run) for run in runs], indent=1) + "\n"


def from_json(text: str) -> tuple[Figures, ...]:
    """Read what `to_json` wrote."""
    return tuple(decode(Figures, run) for run in loads(text))


@cache
def published() -> tuple[Figures, ...]:
    """Return the figures that are installed with this package, newest run first."""
    text = resources.files("thanos_deploy.gpu").joinpath(FILE).read_text(encoding="utf-8")
    return tuple(sorted(from_json(text), key=lambda run: run.date, reverse=True))


def measured_as(pattern: Pattern) -> str | None:
    """Return the model in the figures that has a pattern; None if no model in them has it."""
    match pattern:
        case SemiStructured(2, 4):
            return "2:4"
        case Structured():
            return "structured"
    return None


def sentences(pattern: Pattern, *, card: str | None = None) -> Iterator[str]:
    """Yield a sentence about a pattern for each run that measured it.

    Args:
        pattern: pattern of a pruned model.
        card: name of the only GPU to speak of; None for all.
    """
    model = measured_as(pattern)
    for run in published():
        passes = [one for one in run.passes if one.model == model]
        if passes and card in (None, run.card):
            yield _sentence(run, passes)


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
