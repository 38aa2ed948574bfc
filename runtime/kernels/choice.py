"""Choose the fastest kernel for each shape of a layer and number of tokens, by measurement.

No kernel wins everywhere: at one token a product is limited by reading the weight, at thousands by
the tensor cores, and a library may lose to the dense product at sizes that it was not tuned for. So
all kernels are timed once on the GPU at hand; `kernel_times` keeps the result for the next start.

Every kernel reads the weight in a layout of its own, so a layer holds a copy of the weight for each
kernel that it uses, two at most. The time of such a selection of kernels is the geometric mean over
the buckets of tokens, each with its faster kernel. Among the selections whose time is within
`WORTH` of the fastest, the one with the fewest bytes is chosen.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import exp, inf, log
from statistics import fmean, median

import torch
from torch import Tensor, nn

from runtime.kernels import linears, timing
from runtime.kernels.linears import Multiply
from runtime.kernels.operator import Held, by_tokens, hold
from runtime.kernels.packed import require_dtype
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.model.linear import matrix
from thanos_deploy.progress import OnProgress, silent

logger = logging.getLogger(__name__)

DENSE = "dense"

# Not a candidate: the search of cuSPARSELt includes this algorithm.
_COMPARISON = "cusparselt-first"

# The most tokens of each bucket, and the number of tokens at which the last bucket is measured.
ENDS = (1, 4, 16, 64, 256)
_BEYOND = 2048
TOKENS = (*ENDS, _BEYOND)

# Fraction of the time that a second copy of the weight has to save.
WORTH = 0.03

# Bits for each entry of a 16-bit weight. 2:4 keeps half of the entries, and 2 bits of index or mask
# for each kept entry.
_DENSE_BITS = 16
_SPARSE_BITS = 9

# Samples of a kernel's time and runs before them; each replays a CUDA graph of many products.
_SAMPLES = 20
_WARMUP = 3

# Exceptions for unsupported sizes: libraries raise RuntimeError, our kernels DeployError.
_REFUSALS = (DeployError, RuntimeError, ImportError)


class _WrongProductError(RuntimeError):
    """Raised if a kernel's product differs from the one in float64."""


Maker = Callable[[Tensor, str], Multiply]
# Takes calls that multiply with different copies of one weight; returns the seconds of one call.
Clock = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and dtype of the weight of a linear layer.

    Attributes:
        outputs, inputs: number of output and input features.
        dtype: a key of `timing.DTYPES`.
    """

    outputs: int
    inputs: int
    dtype: str

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "Shape":
        """Return the shape of a weight [outputs, inputs].

        Raises:
            InputError: no kernel for 2:4 takes the dtype.
        """
        require_dtype(weight, name)
        (dtype,) = (key for key, dtype in timing.DTYPES.items() if dtype == weight.dtype)
        outputs, inputs = weight.shape
        return cls(outputs, inputs, dtype)


@dataclass(frozen=True, slots=True)
class Timed:
    """Times of one kernel on one shape.

    Attributes:
        kernel: `DENSE` or a key of `linears.MAKERS`.
        seconds: seconds of one product in each bucket; None where the kernel could not be timed.
        reason: why the first missing time is missing; None if no time is.
    """

    kernel: str
    seconds: tuple[float | None, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Measurements and choice for one shape.

    Attributes:
        shape: shape of the layers.
        chosen: name of the kernel for each bucket.
        timed: times of all candidates.
    """

    shape: Shape
    chosen: tuple[str, ...]
    timed: tuple[Timed, ...]


def makers() -> dict[str, Maker]:
    """Return the candidates: the dense product and the 2:4 kernels, except `_COMPARISON`."""
    others = {name: make for name, make in linears.MAKERS.items() if name != _COMPARISON}
    return {DENSE: partial(hold, DENSE), **others}


def fastest(timed: Sequence[Timed]) -> tuple[str, ...]:
    """Choose the kernel for each bucket, by the rule in the module's docstring.

    Args:
        timed: times of all candidates.

    Raises:
        PlatformError: no candidate has a time in some bucket; the message says why.
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
    chosen = tuple(
        min(names, key=lambda name: seconds[name][index]) for index in range(len(timed[0].seconds))
    )
    for index, (tokens, kernel) in enumerate(zip(TOKENS, chosen, strict=True)):
        if seconds[kernel][index] == inf:
            reasons = "; ".join(f"{one.kernel}: {one.reason}" for one in timed if one.reason)
            raise PlatformError(
                f"no kernel for 2:4 weights multiplies {tokens} tokens here ({reasons})",
                fix="run the checkpoint with dense products, or report this with the GPU and the "
                "versions of PyTorch and Triton",
            )
    return chosen


def bits(kernels: Iterable[str]) -> int:
    """Return the bits for each entry of a 16-bit weight that is held once for each kernel."""
    return sum(_DENSE_BITS if kernel == DENSE else _SPARSE_BITS for kernel in set(kernels))


def measure(
    shapes: Sequence[Shape],
    clock: Clock,
    *,
    candidates: Mapping[str, Maker],
    device: str = "cuda",
    on_progress: OnProgress = silent,
) -> tuple[Row, ...]:
    """Time kernels on random 2:4 weights, and choose one for each bucket.

    A kernel that refuses a shape, or whose product is wrong, gets a reason instead of a time.

    Args:
        shapes: shapes of the layers.
        clock: measures the seconds of one call.
        candidates: makers of the kernels to choose from, by name; includes the dense product.
        device: device to measure on.
        on_progress: called after every shape.
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
    """Time one kernel on one weight, in every bucket."""
    seconds: list[float | None] = []
    reasons = []
    try:
        # Enough copies that none is still in the GPU's cache when its turn comes again.
        copies = [make(weight.clone(), "weight") for _ in range(timing.rotation(weight))]
    except _REFUSALS as refusal:
        return Timed(kernel, (None,) * len(TOKENS), _reason(refusal))
    for tokens in TOKENS:
        try:
            seconds.append(_seconds(copies, weight, tokens, dtype, clock))
        except _REFUSALS as refusal:
            if kernel == DENSE:  # it must work, as the other kernels may all refuse
                raise
            seconds.append(None)
            reasons.append(f"{tokens} tokens: {_reason(refusal)}")
            if isinstance(refusal, _WrongProductError):
                logger.warning("%s is not used for %s", kernel, reasons[-1])
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
            raise _WrongProductError(f"the product is wrong by {error:.1e} of its norm")
    return clock([partial(multiply, x, None) for multiply in copies])


def _reason(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {refusal}".splitlines()[0]


def replayed(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median seconds of one call in a CUDA graph of all calls; the clock for a GPU."""
    times = -(-timing.LEAST_CALLS // len(calls))
    return median(timing.replayed([*calls] * times, samples=_SAMPLES, warmup=_WARMUP))


def replace(model: nn.Module, names: Sequence[str], rows: Mapping[Shape, Row]) -> None:
    """Replace linear layers, one at a time, by layers that multiply with the chosen kernels.

    Args:
        model: the model; changed in place.
        names: full names of the layers.
        rows: a row for the shape of every layer.

    Raises:
        InputError: a weight is not 2:4; the message names the layer.
    """

    def make(weight: Tensor, name: str) -> Held:
        return held_by(rows[Shape.of(weight, name)].chosen, weight, name)

    linears.exchange(model, names, make)


def held_by(chosen: Sequence[str], weight: Tensor, name: str) -> Held:
    """Pack a weight for the kernels that were chosen for it.

    Args:
        chosen: name of the kernel for each bucket.
        weight: [outputs, inputs].
        name: name of the layer, for the message of an error.

    Raises:
        InputError: the weight is not 2:4.
    """
    held = {kernel: hold(kernel, weight, name) for kernel in dict.fromkeys(chosen)}
    return by_tokens([held[kernel] for kernel in chosen], ENDS)


def shapes_of(model: nn.Module, names: Sequence[str]) -> list[Shape]:
    """Return the shape of each of some linear layers.

    Raises:
        InputError: no kernel for 2:4 takes the dtype of a layer.
    """
    return [Shape.of(matrix(model.get_submodule(name)), name) for name in names]
