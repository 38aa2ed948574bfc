"""Products with 2:4 weights: each kernel against float64, and how long it takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.kernels import linears, timing
from thanos_deploy.checkpoint import DTYPES
from thanos_deploy.errors import DeployError
from thanos_deploy.gpu_records import CheckRow, GemmRow, KernelRow, Row
from thanos_deploy.steps import Task

# Outputs and inputs of the linear layers of Llama 3 70B: q and o, k and v, gate and up, down.
SHAPES_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))

Make = Callable[[Tensor, str], linears.Multiply]


@dataclass(frozen=True, slots=True)
class Grid:
    """Which products.

    Attributes:
        shapes: outputs and inputs of the weights.
        tokens: rows of x.
        dtypes: "fp16" and "bf16".
        samples: timed runs of each, where they are timed.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    samples: int = 50


# Sizes that meet every edge of the kernels' tiles, and one layer of an 8B model.
CORRECTNESS = Grid(
    shapes=((37, 148), (130, 68), (300, 1000), (1024, 4096), (4096, 14336)),
    tokens=(1, 2, 4, 5, 16, 17, 64, 256, 2048),
    dtypes=("fp16", "bf16"),
)
GEMM = Grid(shapes=timing.SHAPES, tokens=timing.TOKENS, dtypes=("bf16",))


def dense(weight: Tensor, name: str) -> linears.Multiply:
    """What every kernel is compared with."""
    return lambda x, bias: nn.functional.linear(x, weight, bias)


def maker(kernel: str) -> Make:
    """What makes a multiplication from a weight: "dense", or a key of `linears.MAKERS`."""
    return dense if kernel == "dense" else linears.MAKERS[kernel]


def correctness(kernel: str, grid: Grid, task: Task) -> Iterator[Row]:
    """A kernel's products beside those in float64, of fresh random numbers each.

    What the kernel says that it does not take is a row with the reason; a product that breaks off
    is a failure.
    """
    seed = 0
    for dtype_name in grid.dtypes:
        dtype = DTYPES[dtype_name]
        for outputs, inputs in grid.shapes:
            weight = timing.random_two_four(
                outputs, inputs, dtype, device=task.device, seed=(seed := seed + 1)
            )
            for tokens in grid.tokens:
                generator = torch.Generator(task.device).manual_seed(seed := seed + 1)
                x, bias = (
                    torch.randn(*shape, dtype=dtype, device=task.device, generator=generator)
                    for shape in ((tokens, inputs), (outputs,))
                )
                error, reason = None, None
                try:
                    error = _error(maker(kernel)(weight, "weight"), x, weight, bias)
                except DeployError as refusal:
                    reason = refusal.message
                except RuntimeError as failure:
                    yield CheckRow(
                        f"correctness:{kernel}",
                        f"{kernel}, {dtype_name}, {outputs} x {inputs}, {tokens} tokens",
                        "FAIL",
                        f"{type(failure).__name__}: {failure}".splitlines()[0],
                        "report the card and the versions",
                    )
                    if task.device == "cuda":
                        torch.cuda.synchronize()  # an error that stays is raised once more
                    continue
                yield KernelRow(
                    kernel,
                    dtype_name,
                    outputs,
                    inputs,
                    tokens,
                    error=error,
                    limit=torch.finfo(dtype).eps,
                    reason=reason,
                )


def _error(multiply: linears.Multiply, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """||out - ref|| / ||ref||; NaN if an element was not written."""
    # What the product is written to is, as a rule, the memory that was freed last.
    poison = x.new_full((len(x), len(weight)), torch.nan)
    del poison
    out = multiply(x, bias)
    assert out.shape == (len(x), len(weight))
    expected = torch.addmm(bias.double(), x.double(), weight.double().T)
    return float((out.double() - expected).norm() / expected.norm())


def gemm(kernel: str, grid: Grid, task: Task) -> Iterator[Row]:
    """How long a kernel's products take."""
    for dtype_name in grid.dtypes:
        for time in timing.measure(
            grid.shapes,
            grid.tokens,
            kernels=(kernel,),
            dtype=DTYPES[dtype_name],
            device=task.device,
            samples=grid.samples,
        ):
            yield GemmRow(
                time.kernel,
                dtype_name,
                time.outputs,
                time.inputs,
                time.tokens,
                time.seconds,
                time.error,
                time.reason,
            )


def speeds(rows: Sequence[GemmRow]) -> dict[GemmRow, float]:
    """How many times as fast as the dense product each is, where both were timed."""
    times = {
        (row.dtype, row.outputs, row.inputs, row.tokens): row.median
        for row in rows
        if row.kernel == "dense" and row.seconds
    }
    found = {}
    for row in rows:
        size = (row.dtype, row.outputs, row.inputs, row.tokens)
        if row.kernel != "dense" and row.seconds and size in times:
            found[row] = times[size] / row.median
    return found
