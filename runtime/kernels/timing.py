"""Measure y = x W^T with a 2:4 W: the dense product, torch's libraries, and our kernels."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import nan
from statistics import median

import torch
from torch import Tensor

from runtime.kernels import linears
from runtime.kernels.linears import Multiply
from runtime.kernels.operator import hold
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.progress import OnProgress, silent

TOKENS = (1, 16, 64, 256, 2048)

# Outputs and inputs of the linear layers of Llama 3 8B and 70B: q and o, k and v, gate and up,
# down. The grouped k and v of 70B have as many rows as those of 8B.
SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (1024, 8192),
    (28672, 8192),
    (8192, 28672),
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

KERNELS = ("dense", *linears.MAKERS)

# In a model, a layer's weights were last read a whole step ago, so the cache does not hold them.
# Measurements therefore rotate among copies of a weight that take this many times the cache.
_CACHES = 2

# Least number of calls in a CUDA graph, so that starting it (some 10 us) matters little.
LEAST_CALLS = 16

# Clock cycles that the GPU waits before timed products (some 0.5 ms), while the host launches them.
_HEAD_START = 1_000_000

# Rows of the weight that the float64 product takes at once.
_ROWS_AT_ONCE = 1024

# Exceptions of kernels for sizes, dtypes and devices that they do not support. Any other exception
# is a failure.
_REFUSALS = (DeployError, NotImplementedError, ImportError)

# The pairs of columns of a group of four that can be kept.
_PAIRS = tuple(itertools.combinations(range(4), 2))


@dataclass(frozen=True, slots=True)
class GemmTime:
    """Measurement of one product.

    Attributes:
        kernel: "dense", or a key of `linears.MAKERS`.
        dtype: a key of `DTYPES`.
        outputs, inputs: size of W.
        tokens: number of rows of x.
        seconds: seconds of one product in each sample, with weights that are not in the cache; None
            if it was not timed.
        error: relative error ||out - ref|| / ||ref|| in the Frobenius norm, against the product in
            float64; None if there is no product.
        reason: why it was not timed; None if it was, or if no timing was asked for.
        failed: whether the kernel broke or its product is wrong; a kernel that does not support a
            size or a device has not failed.
    """

    kernel: str
    dtype: str
    outputs: int
    inputs: int
    tokens: int
    seconds: tuple[float, ...] | None
    error: float | None
    reason: str | None
    failed: bool = False

    @property
    def median(self) -> float:
        """Median of the seconds; NaN without samples."""
        return median(self.seconds) if self.seconds else nan


def limit(dtype: str) -> float:
    """Return the largest `GemmTime.error` of a correct product: one unit in the last place.

    Rounding the product to 16 bits is off by half a unit at most. The other half is for libraries
    that also round partial sums.
    """
    return torch.finfo(DTYPES[dtype]).eps


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    kernels: Sequence[str] = KERNELS,
    device: str = "cuda",
    samples: int = 50,
    warmup: int = 10,
    on_progress: OnProgress = silent,
) -> Iterator[GemmTime]:
    """Check and time kernels with random 2:4 weights; yield every result as soon as it is there.

    A kernel that refuses or fails, or whose product is wrong, gets a reason instead of a time.

    Args:
        shapes: outputs and inputs of the weights.
        tokens: numbers of rows of x.
        dtypes: keys of `DTYPES`.
        kernels: names from `KERNELS`.
        device: "cuda", or "cpu" to rehearse with small shapes; times on a CPU mean nothing.
        samples: number of timed runs; with 0 the products are checked but not timed.
        warmup: number of runs before the timed ones.
        on_progress: called after every weight.

    Raises:
        PlatformError: there is no GPU.
        RuntimeError: the GPU is unusable after a kernel failed; the result of that kernel was
            yielded before.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            "no GPU: PyTorch finds no NVIDIA GPU to measure on",
            fix="run it on a machine with an NVIDIA GPU, its driver and a CUDA build of PyTorch",
        )
    weights = list(itertools.product(shapes, dtypes))
    on_progress(0, len(weights))
    for number, ((outputs, inputs), dtype) in enumerate(weights, 1):
        weight = random_two_four(outputs, inputs, DTYPES[dtype], device=device)
        made = {kernel: _make(kernel, weight, samples) for kernel in kernels}
        for rows in tokens:
            x = _random_x(rows, weight)
            expected = product_in_float64(x, weight)
            for kernel, multiplies in made.items():
                yield _measured(kernel, dtype, multiplies, x, expected, samples, warmup)
                if device == "cuda":
                    torch.cuda.synchronize()  # raises again if the GPU is lost
        on_progress(number, len(weights))


def random_two_four(
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Return a random 2:4 matrix [outputs, inputs], the same for one seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    # Drawn in float32, because in float16 torch draws exact zeros now and then.
    groups = torch.randn(outputs * inputs // 4, 4, device=device, generator=generator).to(dtype)
    which = torch.randint(
        len(_PAIRS), (len(groups),), dtype=torch.int32, device=device, generator=generator
    )
    dropped = torch.tensor(
        [[column not in pair for column in range(4)] for pair in _PAIRS], device=device
    )
    return groups.masked_fill_(dropped[which], 0).reshape(outputs, inputs)


def product_in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [tokens, outputs] in float64, converting a block of rows of W at a time."""
    wide = x.double()
    return torch.cat([wide @ rows.double().T for rows in weight.split(_ROWS_AT_ONCE)], dim=1)


def replayed(
    calls: Sequence[Callable[[], object]], *, samples: int, warmup: int
) -> tuple[float, ...]:
    """Return the seconds of one call for each sample.

    On a GPU all calls are captured in one CUDA graph. A sample is a replay of the graph between two
    events, all of which the host has launched before the GPU begins. Without a GPU the calls run
    one after the other and the host's clock times them; that is for rehearsals.

    Args:
        calls: the same work on different data, so that no cache helps. Each kernel was called
            before, so nothing is left to compile or search.
        samples: number of timed replays.
        warmup: number of replays before them.
    """
    if not torch.cuda.is_available():
        return tuple(_host_seconds(calls) for _ in range(warmup + samples))[warmup:]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(warmup):
        graph.replay()
    events = []
    for _ in range(samples):
        torch.cuda._sleep(_HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) / 1e3 / len(calls) for start, end in events)


def _host_seconds(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def rotation(weight: Tensor) -> int:
    """Return a number of copies of a weight that exceeds the GPU's L2 cache, packed or dense."""
    if not weight.is_cuda:
        return 2
    cache: int = torch.cuda.get_device_properties(weight.device).L2_cache_size
    packed = weight.nbytes * 9 // 16
    return math.ceil(_CACHES * cache / packed) + 1


def _dense(weight: Tensor, name: str) -> Multiply:
    return hold("dense", weight.clone(), name)


def _make(kernel: str, weight: Tensor, samples: int) -> list[Multiply] | Exception:
    """Make a kernel on as many copies of a weight as timing takes; or return the exception."""
    make = _dense if kernel == "dense" else linears.MAKERS[kernel]
    try:
        return [make(weight, "weight") for _ in range(rotation(weight) if samples else 1)]
    except (*_REFUSALS, RuntimeError) as problem:
        return problem


def _measured(
    kernel: str,
    dtype: str,
    multiplies: list[Multiply] | Exception,
    x: Tensor,
    expected: Tensor,
    samples: int,
    warmup: int,
) -> GemmTime:
    """Check and time one kernel for one x."""
    row = partial(GemmTime, kernel, dtype, expected.shape[1], x.shape[1], len(x))
    if isinstance(multiplies, Exception):
        return row(None, None, _reason(multiplies), not isinstance(multiplies, _REFUSALS))
    error = None
    try:
        # The first call compiles, tunes and searches.
        with _poisoned():
            y = multiplies[0](x, None)
        error = float((y.double() - expected).norm() / expected.norm())
        if not error <= limit(dtype):  # NaN is not
            return row(None, error, "the product is not that of float64", True)
        if not samples:
            return row(None, error, None)
        calls = [partial(multiply, x, None) for multiply in multiplies]
        times = -(-LEAST_CALLS // len(calls)) if x.is_cuda else 1
        return row(replayed(calls * times, samples=samples, warmup=warmup), error, None)
    except (*_REFUSALS, RuntimeError) as problem:
        return row(None, error, _reason(problem), not isinstance(problem, _REFUSALS))


def _random_x(tokens: int, weight: Tensor) -> Tensor:
    """Random x [tokens, inputs], seeded by the number of tokens."""
    generator = torch.Generator(weight.device).manual_seed(tokens)
    return torch.randn(
        tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator
    )


@contextmanager
def _poisoned() -> Iterator[None]:
    """Within the `with` statement, torch fills new tensors with NaN.

    So entries that a kernel does not write show. It is a feature of torch's deterministic mode.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Dense libraries warn that they may not be deterministic.
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
