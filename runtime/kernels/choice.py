"""Which kernel multiplies fastest, for each shape of a layer and number of tokens: by measurement.

No kernel wins everywhere: at one token a product waits for the weight to be read, at thousands for
the tensor cores, and a library may lose to the dense product at what it was not tuned for. So all
of them are timed once on the GPU at hand, and the result is kept in a file for the next start.

Every kernel reads the weight in a layout of its own, so a layer holds a copy for each kernel that
it uses: at most two, and of all such selections the one with the fewest bytes among those that are
within `WORTH` of the fastest. How fast a selection is, is the geometric mean over the buckets of
tokens, each at its faster kernel.
"""

import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import exp, inf, log
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn

from runtime.kernels import linears, timing
from runtime.kernels.linears import Multiply
from runtime.kernels.packed import require_dtype
from thanos_deploy import __version__
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import decode_format, encode, loads
from thanos_deploy.errors import DeployError
from thanos_deploy.machine import environment
from thanos_deploy.model.linear import matrix
from thanos_deploy.progress import OnProgress, silent

logger = logging.getLogger(__name__)

FORMAT = "thanos-deploy/kernels/1"
FILE = "kernels.json"
DENSE = "dense"

# Never faster than the library's search, which includes it.
_COMPARISON = "cusparselt-first"

# The most tokens of each bucket, and what the bucket beyond is measured at.
ENDS = (1, 4, 16, 64, 256)
_BEYOND = 2048
TOKENS = (*ENDS, _BEYOND)

# Of time: what another copy of the weights has to gain.
WORTH = 0.03

# Bits of a weight in 16 bits: 2:4 keeps half of them, and 2 bits of index or mask for each.
_DENSE_BITS = 16
_SPARSE_BITS = 9

# Of a product's time, each of a graph of many products.
_SAMPLES = 20
_WARMUP = 3

# Libraries refuse with RuntimeError, ours with DeployError.
_REFUSALS = (DeployError, RuntimeError, ImportError)

Maker = Callable[[Tensor, str], Multiply]
# Calls that do the same on different copies of a weight -> seconds of one.
Clock = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a linear layer.

    Attributes:
        outputs, inputs: of its weight.
        dtype: of its weight, a key of `timing.DTYPES`.
    """

    outputs: int
    inputs: int
    dtype: str

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "Shape":
        """The shape of a weight [outputs, inputs].

        Raises:
            InputError: no kernel for 2:4 takes its dtype.
        """
        require_dtype(weight, name)
        (dtype,) = (key for key, dtype in timing.DTYPES.items() if dtype == weight.dtype)
        outputs, inputs = weight.shape
        return cls(outputs, inputs, dtype)


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel on one shape.

    Attributes:
        kernel: `DENSE` or a key of `linears.MAKERS`.
        seconds: of one product in each bucket; None where there is none.
        reason: why the first of those is missing; None if all are there.
    """

    kernel: str
    seconds: tuple[float | None, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured and chosen for one shape.

    Attributes:
        shape: of the layers.
        chosen: the kernel for each bucket.
        timed: all that were tried.
    """

    shape: Shape
    chosen: tuple[str, ...]
    timed: tuple[Timed, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a measurement holds for.

    Attributes:
        card: name of the GPU.
        torch, triton, tool: versions; triton is None where it is not installed.
    """

    card: str
    torch: str
    triton: str | None
    tool: str

    @classmethod
    def here(cls) -> "Origin":
        """The current GPU and what is installed."""
        libraries = environment.describe().libraries
        return cls(
            torch.cuda.get_device_name(), torch.__version__, libraries.get("triton"), __version__
        )


@dataclass(frozen=True, slots=True)
class _Table:
    """The content of the file: what was measured, and what that holds for."""

    format: str
    origin: Origin
    rows: tuple[Row, ...]


def bucket(tokens: int) -> int:
    """Index of the bucket for a number of tokens."""
    return bisect_left(ENDS, tokens)


def dense(weight: Tensor, name: str) -> Multiply:
    """Multiply with a weight as it is; a maker like those of `linears.MAKERS`."""
    held = weight.contiguous()
    return lambda x, bias: nn.functional.linear(x, held, bias)


def makers() -> dict[str, Maker]:
    """The kernels to choose from: the dense product, and all for 2:4 but one to compare with."""
    others = {name: make for name, make in linears.MAKERS.items() if name != _COMPARISON}
    return {DENSE: dense, **others}


def fastest(timed: Sequence[Timed]) -> tuple[str, ...]:
    """The kernel for each bucket, by the rule in the module's docstring.

    Args:
        timed: all kernels; at least one has a time in every bucket.
    """
    seconds = {one.kernel: [inf if t is None else t for t in one.seconds] for one in timed}
    selections = {
        names: exp(
            fmean(log(min(times)) for times in zip(*(seconds[n] for n in names), strict=True))
        )
        for size in (1, 2)
        for names in combinations(seconds, size)
    }
    least = min(selections.values())
    names = min(
        (names for names, mean in selections.items() if mean <= (1 + WORTH) * least),
        key=lambda names: (bits(names), selections[names]),
    )
    return tuple(
        min(names, key=lambda name: seconds[name][index]) for index in range(len(timed[0].seconds))
    )


def bits(kernels: Iterable[str]) -> int:
    """Of a weight in 16 bits that is held for each of some different kernels."""
    return sum(_DENSE_BITS if kernel == DENSE else _SPARSE_BITS for kernel in set(kernels))


def measure(
    shapes: Sequence[Shape],
    clock: Clock,
    *,
    candidates: Mapping[str, Maker],
    device: str = "cuda",
    on_progress: OnProgress = silent,
) -> tuple[Row, ...]:
    """Time kernels on random 2:4 weights, and choose.

    A kernel that refuses a shape, or whose product is not that of the weight, has no time but a
    reason.

    Args:
        shapes: of the layers.
        clock: says how long a call takes.
        candidates: what to choose from; the dense product is one of them.
        device: where to measure.
        on_progress: told of every shape.
    """
    rows = []
    on_progress(0, len(shapes))
    for number, shape in enumerate(shapes, 1):
        weight = timing.random_two_four(
            shape.outputs, shape.inputs, timing.DTYPES[shape.dtype], device=device
        )
        timed = tuple(
            _time(kernel, make, weight, shape.dtype, clock) for kernel, make in candidates.items()
        )
        rows.append(Row(shape, fastest(timed), timed))
        on_progress(number, len(shapes))
    return tuple(rows)


def _time(kernel: str, make: Maker, weight: Tensor, dtype: str, clock: Clock) -> Timed:
    """One kernel on one weight, in every bucket."""
    seconds: list[float | None] = []
    reasons = []
    try:
        # As many that the cache of the GPU holds none of them when its turn comes.
        copies = [make(weight.clone(), "weight") for _ in range(timing.rotation(weight))]
    except _REFUSALS as refusal:
        return Timed(kernel, (None,) * len(TOKENS), _reason(refusal))
    for tokens in TOKENS:
        try:
            seconds.append(_seconds(copies, weight, tokens, dtype, clock))
        except _REFUSALS as refusal:
            if kernel == DENSE:  # nothing would be left to choose
                raise
            seconds.append(None)
            reasons.append(f"{tokens} tokens: {_reason(refusal)}")
    return Timed(kernel, tuple(seconds), reasons[0] if reasons else None)


def _seconds(
    copies: Sequence[Multiply], weight: Tensor, tokens: int, dtype: str, clock: Clock
) -> float:
    generator = torch.Generator(weight.device).manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], device=weight.device, generator=generator)
    x = x.to(weight.dtype)
    expected = timing.product_in_float64(x, weight)
    for multiply in copies:  # the first call compiles, tunes and searches
        error = float((multiply(x, None).double() - expected).norm() / expected.norm())
        if not error <= timing.limit(dtype):  # NaN is not
            raise RuntimeError(f"the product is wrong by {error:.1e} of its norm")
    return clock([partial(multiply, x, None) for multiply in copies])


def _reason(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {refusal}".splitlines()[0]


def replayed(calls: Sequence[Callable[[], object]]) -> float:
    """The clock of a GPU: the median second of one call, within a CUDA graph of all."""
    times = -(-timing.LEAST_CALLS // len(calls))
    return median(timing.replayed([*calls] * times, samples=_SAMPLES, warmup=_WARMUP))


def read(path: Path, origin: Origin) -> tuple[Row, ...]:
    """What a file says that was measured on the same GPU with the same versions; else nothing.

    A file of another origin or that cannot be read is no error, because all of it can be measured
    anew; the log says so.
    """
    try:
        table = decode_format(_Table, loads(path.read_bytes()), FORMAT)
        _require_known(table.rows)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        logger.warning(
            "%s: the kernels are measured again, because this file is not readable (%s)",
            path,
            error,
        )
        return ()
    if table.origin != origin:
        logger.warning(
            "%s: the kernels are measured again, because this file is for %s; this is %s",
            path,
            table.origin,
            origin,
        )
        return ()
    return table.rows


def write(path: Path, origin: Origin, rows: Sequence[Row]) -> None:
    """Keep what was measured, for `read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_json(path, encode(_Table(FORMAT, origin, tuple(rows))))


def _require_known(rows: Sequence[Row]) -> None:
    """Refuse rows whose choice is not of a kernel that was timed and is still there.

    Raises:
        ValueError: one is.
    """
    for row in rows:
        known = {one.kernel for one in row.timed} & makers().keys()
        if len(row.chosen) != len(TOKENS) or not known.issuperset(row.chosen):
            raise ValueError(f"{row.chosen} chosen for {row.shape}")


def folder(keep: Path | None, architecture: str) -> Path:
    """Where to keep what is measured.

    Args:
        keep: the folder of a bundle's engines; None if there is no bundle.
        architecture: of the GPU, such as "sm90".

    Returns:
        a folder in there, or in the cache folder of thanos-deploy where the bundle cannot be
        written to.
    """
    if keep is None or not os.access(keep if keep.exists() else keep.parent, os.W_OK):
        keep = environment.cache_folder()
    return keep / f"torch-{architecture}"


def rows_for(
    shapes: Sequence[Shape],
    path: Path,
    origin: Origin,
    measured: Callable[[Sequence[Shape]], tuple[Row, ...]],
) -> dict[Shape, Row]:
    """The rows of some shapes, from a file as far as it has them.

    The log says where they come from and what memory the layers will take.

    Args:
        shapes: of all layers.
        path: of the file; it has all rows afterwards.
        origin: this GPU and these versions.
        measured: measures the shapes that are missing.
    """
    rows = {row.shape: row for row in read(path, origin)}
    missing = [shape for shape in dict.fromkeys(shapes) if shape not in rows]
    if missing:
        logger.warning("measuring the kernels for %d shapes of layers: %s", len(missing), path)
        rows |= {row.shape: row for row in measured(missing)}
        write(path, origin, list(rows.values()))
    logger.info(
        "%s: the linear layers take %d bytes of memory; dense layers would take %d",
        path,
        sum(shape.outputs * shape.inputs * bits(rows[shape].chosen) // 8 for shape in shapes),
        sum(shape.outputs * shape.inputs * _DENSE_BITS // 8 for shape in shapes),
    )
    return rows


def replace(model: nn.Module, names: Sequence[str], rows: Mapping[Shape, Row]) -> None:
    """Exchange linear layers, one at a time, for ones that multiply with what was chosen.

    Args:
        model: where they are.
        names: their full names.
        rows: for the shape of each.

    Raises:
        InputError: a weight is not 2:4; the message names the layer.
    """
    known = makers()

    def make(weight: Tensor, name: str) -> Multiply:
        chosen = rows[Shape.of(weight, name)].chosen
        held = {kernel: known[kernel](weight, name) for kernel in dict.fromkeys(chosen)}
        by_bucket = [held[kernel] for kernel in chosen]
        # A branch on a shape: a CUDA graph records the kernel of its own number of tokens.
        return lambda x, bias: by_bucket[bucket(len(x))](x, bias)

    linears.exchange(model, names, make)


def shapes_of(model: nn.Module, names: Sequence[str]) -> list[Shape]:
    """The shape of each of some linear layers.

    Raises:
        InputError: no kernel for 2:4 takes the dtype of one.
    """
    return [Shape.of(matrix(model.get_submodule(name)), name) for name in names]
