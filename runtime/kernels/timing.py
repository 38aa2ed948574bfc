"""How long y = x W^T takes with a 2:4 W: dense, by torch's libraries, and by our kernels."""

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
from torch import Tensor, nn

from runtime.kernels import linears
from runtime.kernels.linears import Multiply
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

# A layer's weights were last read a whole step ago, so the cache must not hold them: the product
# goes round among weights that take this many times the cache.
_CACHES = 2

# Captured at least, so that starting a graph, some 10 us, is little beside what it runs.
LEAST_CALLS = 16

# Clock cycles that the GPU waits before timed products, some 0.5 ms, while the host launches them.
_HEAD_START = 1_000_000

# Rows of the weight that the float64 product takes at once.
_ROWS_AT_ONCE = 1024

# What kernels raise for sizes, dtypes and devices that they do not take. Anything else is a
# failure.
_REFUSALS = (DeployError, NotImplementedError, ImportError)

# The pairs of columns of a group of four that can be kept.
_PAIRS = tuple(itertools.combinations(range(4), 2))


@dataclass(frozen=True, slots=True)
class GemmTime:
    """One product, measured.

    Attributes:
        kernel: "dense", or a key of `linears.MAKERS`.
        dtype: a key of `DTYPES`.
        outputs, inputs: of W.
        tokens: rows of x.
        seconds: of one product, each sample, with weights that no cache holds; None where it was
            not timed.
        error: ||out - ref|| / ||ref||, Frobenius, of the product in float64; None where there is no
            product.
        reason: why it was not timed.
        failed: the kernel broke, or its product is wrong; a kernel that does not take a size or a
            device has not failed.
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
        """Seconds; NaN where there are none."""
        return median(self.seconds) if self.seconds else nan


def limit(dtype: str) -> float:
    """The largest `GemmTime.error` of a right product.

    Rounding it to 16 bits is off by half a unit in the last place at most. The other half is for
    libraries that round partial sums as well.
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
    """Check and time kernels with random 2:4 weights; a row comes as soon as it is measured.

    A kernel that refuses, or fails, or whose product is not that of float64, has no time but a
    reason.

    Args:
        shapes: outputs and inputs of the weights.
        tokens: rows of x.
        dtypes: keys of `DTYPES`.
        kernels: of `KERNELS`.
        device: "cuda"; or "cpu", to rehearse with small shapes: no time means anything there.
        samples: timed runs of each; with 0 the products are checked and not timed.
        warmup: runs before them.
        on_progress: told of every weight.

    Raises:
        PlatformError: there is no GPU.
        RuntimeError: the GPU does not go on after a kernel failed; its row has come before.
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
    """A matrix that keeps two random entries of every four, the same each time on one device."""
    generator = torch.Generator(device).manual_seed(seed)
    # In float32, because torch draws zeros now and then in float16.
    groups = torch.randn(outputs * inputs // 4, 4, device=device, generator=generator).to(dtype)
    which = torch.randint(
        len(_PAIRS), (len(groups),), dtype=torch.int32, device=device, generator=generator
    )
    dropped = torch.tensor(
        [[column not in pair for column in range(4)] for pair in _PAIRS], device=device
    )
    return groups.masked_fill_(dropped[which], 0).reshape(outputs, inputs)


def product_in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [tokens, outputs] in float64, widening some rows of W at a time."""
    wide = x.double()
    return torch.cat([wide @ rows.double().T for rows in weight.split(_ROWS_AT_ONCE)], dim=1)


def replayed(
    calls: Sequence[Callable[[], object]], *, samples: int, warmup: int
) -> tuple[float, ...]:
    """Seconds of one call, in each sample.

    On a GPU all calls are captured in one CUDA graph, and a sample is a replay of it between two
    events, which the host has launched before it begins. Without a GPU they are called one after
    the other, under the host's clock; that is for rehearsals.

    Args:
        calls: the same work on different data, so that no cache helps; what a first call compiles
            or searches was done before.
        samples: how many to time.
        warmup: how many to run before them.
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
    """How many copies of a weight, packed or dense, are more than the GPU's L2 cache holds."""
    if not weight.is_cuda:
        return 2
    cache: int = torch.cuda.get_device_properties(weight.device).L2_cache_size
    packed = weight.nbytes * 9 // 16
    return math.ceil(_CACHES * cache / packed) + 1


def _dense(weight: Tensor, name: str) -> Multiply:
    held = weight.clone()
    return lambda x, bias: nn.functional.linear(x, held, bias)


def _make(kernel: str, weight: Tensor, samples: int) -> list[Multiply] | Exception:
    """A kernel on copies of a weight, as many as timing takes; or why not."""
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
    """The row of one kernel."""
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
    """Rows of x, others for each number of them."""
    generator = torch.Generator(weight.device).manual_seed(tokens)
    return torch.randn(
        tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator
    )


@contextmanager
def _poisoned() -> Iterator[None]:
    """New tensors hold NaN: what a kernel leaves out shows. A mode of torch's that is for this."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Of dense libraries, that they may not be deterministic.
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
