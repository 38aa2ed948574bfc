"""The models: dense, pruned, and quantised with error compensation.

Each model is a folder; a model that was quantised with error compensation has a second folder with
its codes. Models that exist in the output folder are used, and an interrupted bundle is continued.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.comparison.record import Way
from thanos_deploy.bundle import layout
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.measure.run import DENSE
from thanos_deploy.pattern import Unstructured, parse
from thanos_deploy.progress import Announce
from thanos_deploy.pruning.result import PRUNE, codes_of
from thanos_deploy.solver.grid import parse as parse_grid
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest

# dtypes of the weights, by their names in graph exports.
Dtype = Literal["fp32", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("fp32", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that exports of one dtype are made from.

    Attributes:
        model: "dense", or the pattern that the model was pruned to.
        dtype: dtype of the exports.
        way: how the weights are brought to this dtype.
        folder: folder of the model, with the weights as they are before an export rounds them.
        codes: folder with the codes that exports keep; None if there are none.
        source: name and hash of the content of `folder`.
    """

    model: str
    dtype: Dtype
    way: Way
    folder: Path
    codes: Path | None
    source: Source

    @property
    def slug(self) -> str:
        """The name for files and folders."""
        return f"{self.model}-{self.dtype}-{self.way}".replace(":", "-")


@dataclass(frozen=True, slots=True)
class Making:
    """Settings with which the models are made.

    Attributes:
        out: folder for the bundles.
        given: options of `prune` for every pattern, by keyword.
        calibration: those options of `given` that quantisation needs too.
        compensated: dtypes to quantise with error compensation; the others are rounded.
    """

    out: Path
    given: Mapping[str, Any]
    calibration: Mapping[str, Any]
    compensated: Sequence[Dtype]


def dense_weights(dense: Dense, making: Making, announce: Announce) -> Iterator[Weights]:
    """Yield the weights of the dense model; compensated ones come in rounded form too."""
    folder = dense.checkpoint(announce).folder
    for one in _weights(DENSE, dense, folder, making, announce):
        if one.way == "compensated":
            yield Weights(DENSE, one.dtype, "rounded", folder, None, dense.source)
        yield one


def pruned_weights(
    pattern: str, dense: Dense, making: Making, announce: Announce
) -> Iterator[Weights]:
    """Prune the model to a pattern, unless that is done, and yield its weights."""
    folder = making.out / pattern.replace(":", "-")
    with claim(folder, dense.source) as bundle:
        request = PruneRequest.of(parse(pattern), **making.given)
        prune(bundle, dense, request, announce=announce)
    yield from bundle_weights(folder, making, announce)


def bundle_weights(path: Path, making: Making, announce: Announce) -> Iterator[Weights]:
    """Yield the weights of a bundle; a quantised one is exported only in its own dtype."""
    bundle = Bundle.open(path)
    bundle.require(layout.PRUNE, "`thanos-deploy prune`")
    options = bundle.options(PRUNE)
    model = str(parse(options.pattern))
    pruned = Dense(str(path))
    if options.quantize is not None:
        dtype: Dtype = "int8" if parse_grid(options.quantize).bits == 8 else "int4"
        folder = path / layout.MODEL
        yield Weights(model, dtype, "compensated", folder, codes_of(bundle), pruned.source)
        return
    yield from _weights(model, pruned, path / layout.MODEL, making, announce)


def _weights(
    model: str, source: Dense, folder: Path, making: Making, announce: Announce
) -> Iterator[Weights]:
    for dtype in DTYPES:
        if dtype in making.compensated:
            yield _compensated(model, dtype, source, making, announce)
        else:
            way: Way = "exact" if dtype == "fp32" else "rounded"
            yield Weights(model, dtype, way, folder, None, source.source)


def _compensated(
    model: str, dtype: Dtype, source: Dense, making: Making, announce: Announce
) -> Weights:
    """Quantise a model with error compensation, without pruning any further weight."""
    folder = making.out / f"{model.replace(':', '-')}-{dtype}"
    request = PruneRequest.of(
        Unstructured(0.0),
        method="magnitude",
        preset="paper",
        quantize=dtype,
        **making.calibration,
    )
    with claim(folder, source.source) as bundle:
        prune(bundle, source, request, announce=announce)
        codes = codes_of(bundle)
    quantised = Dense(str(folder)).source
    return Weights(model, dtype, "compensated", folder / layout.MODEL, codes, quantised)
