"""How long y = x W^T takes with a 2:4 W: dense, by torch's libraries, and by our kernels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from statistics import median

import torch
from torch import Tensor, nn

from runtime.kernels import linears
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.progress import OnProgress, silent

TOKENS = (1, 16, 256, 2048)

# Outputs and inputs of the linear layers of Llama 3 8B: q and o, k and v, gate and up, down.
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))

# Of a product's difference from the dense one, relative to its largest entry: units in its last
# place. Both are rounded, and the library behind the dense one may sum in 16 bits.
_LIMIT_UNITS = 4

# Libraries refuse with RuntimeError, ours with DeployError.
_REFUSALS = (DeployError, RuntimeError, ImportError)

# Clock cycles that the GPU waits before a timed product, some 0.5 ms, while the host launches it.
_HEAD_START = 1_000_000


@dataclass(frozen=True, slots=True)
class GemmTime:
    """One product, measured.

    Attributes:
        kernel: "dense", or a key of `linears.MAKERS`.
        outputs, inputs: of W.
        tokens: rows of x.
        seconds: raw, of the product alone, the L2 cache being cold; None where there is none.
        error: largest difference from the dense product, relative to its largest entry.
        reason: why it was not measured.
    """

    kernel: str
    outputs: int
    inputs: int
    tokens: int
    seconds: tuple[float, ...] | None
    error: float | None
    reason: str | None

    @property
    def median(self) -> float:
        """Seconds; NaN where there are none."""
        return median(self.seconds) if self.seconds else nan


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.float16,
    samples: int = 50,
    warmup: int = 10,
    on_progress: OnProgress = silent,
) -> list[GemmTime]:
    """Time every kernel on every shape, on the current GPU, with random 2:4 weights.

    A kernel that refuses a shape, or whose product is not that of the dense one, has no time but a
    reason.

    Args:
        shapes: outputs and inputs of the weights.
        tokens: rows of x.
        dtype: float16 or bfloat16.
        samples: timed runs of each.
        warmup: runs before them, which also tune and compile.
        on_progress: told of every weight.

    Raises:
        PlatformError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise PlatformError(
            "no GPU: PyTorch finds no NVIDIA GPU to measure on",
            fix="run it on a machine with one, with its driver and a CUDA build of PyTorch",
        )
    found: list[GemmTime] = []
    on_progress(0, len(shapes))
    for number, (outputs, inputs) in enumerate(shapes, 1):
        weight = random_two_four(outputs, inputs, dtype).cuda()
        makers: dict[str, Callable[[Tensor, str], linears.Multiply]] = {
            "dense": lambda weight, _: lambda x, bias: nn.functional.linear(x, weight, bias),
            **linears.MAKERS,
        }
        for kernel, make in makers.items():
            found += _of_kernel(kernel, make, weight, tokens, samples, warmup)
        on_progress(number, len(shapes))
    return found


def random_two_four(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """A matrix that keeps two random entries of every four, the same each time."""
    pattern = SemiStructured(2, 4)
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(outputs * inputs // pattern.group, pattern.group, generator=generator)
    order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    groups.scatter_(1, order[:, pattern.kept :], 0)
    return groups.reshape(outputs, inputs).to(dtype)


def _of_kernel(
    kernel: str,
    make: Callable[[Tensor, str], linears.Multiply],
    weight: Tensor,
    tokens: Sequence[int],
    samples: int,
    warmup: int,
) -> Iterator[GemmTime]:
    """The records of one kernel on one weight."""
    outputs, inputs = weight.shape
    record = partial(GemmTime, kernel, outputs, inputs)
    try:
        multiply = make(weight, "weight")
    except _REFUSALS as refusal:
        yield from (record(rows, None, None, _reason(refusal)) for rows in tokens)
        return
    generator = torch.Generator(weight.device).manual_seed(1)
    for rows in tokens:
        x = torch.randn(rows, inputs, dtype=weight.dtype, device=weight.device, generator=generator)
        expected = nn.functional.linear(x, weight)
        try:
            difference = (multiply(x, None) - expected).abs().max() / expected.abs().max()
            error = float(difference)
            if not error <= _LIMIT_UNITS * torch.finfo(weight.dtype).eps:  # NaN is not
                yield record(rows, None, error, "the product is not that of the dense one")
                continue
            seconds = _time(partial(multiply, x, None), samples, warmup)
            yield record(rows, seconds, error, None)
        except _REFUSALS as refusal:
            yield record(rows, None, None, _reason(refusal))


def _reason(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {refusal}".splitlines()[0]


def _time(run: Callable[[], Tensor], samples: int, warmup: int) -> tuple[float, ...]:
    """Seconds of each run, by CUDA events, with nothing of its operands in the L2 cache."""
    size: int = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        run()
    events = []
    for _ in range(samples):
        flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) / 1e3 for start, end in events)
