"""Products with 2:4 weights: the error of each kernel against float64, and its time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.kernels import linears, timing
from runtime.kernels.timing import GemmTime
from thanos_deploy.gpu.rows import CheckRow, GemmRow, KernelRow, Row
from thanos_deploy.gpu_check.steps import Task

# The kernels for 2:4 weights, each measured in a process of its own.
KERNELS = tuple(linears.MAKERS)


@dataclass(frozen=True, slots=True)
class Grid:
    """The products to compute.

    Attributes:
        shapes: outputs and inputs of each weight.
        tokens: numbers of rows of x.
        dtypes: "fp16", "bf16" or both.
        samples: number of timed runs of each product; `correctness` does not time them.
    """

    shapes: tuple[tuple[int, int], ...] = timing.SHAPES
    tokens: tuple[int, ...] = timing.TOKENS
    dtypes: tuple[str, ...] = ("bf16",)
    samples: int = 50


# Sizes that cover the boundaries of the kernels' tiles, and two layers of an 8B model.
CORRECTNESS = Grid(
    shapes=((37, 148), (130, 68), (300, 1000), (1024, 4096), (4096, 14336)),
    tokens=(1, 2, 4, 5, 16, 17, 64, 256, 2048),
    dtypes=("fp16", "bf16"),
)


def correctness(kernel: str, grid: Grid, task: Task) -> Iterator[Row]:
    """Yield the errors of a kernel's products against the same products in float64.

    A product that the kernel refuses is a row with the reason.
    """
    for found in _measured(kernel, grid, task, samples=0):
        yield KernelRow(
            kernel,
            found.dtype,
            found.outputs,
            found.inputs,
            found.tokens,
            error=found.error,
            limit=timing.limit(found.dtype),
            reason=found.reason if found.error is None else None,
        )
        if found.failed and found.error is None:
            yield _failure(f"correctness:{kernel}", found)


def gemm(kernel: str, grid: Grid, task: Task) -> Iterator[Row]:
    """Yield the times of a kernel's products; "dense" gives the times to compare others with."""
    for found in _measured(kernel, grid, task, samples=grid.samples):
        yield GemmRow(
            kernel,
            found.dtype,
            found.outputs,
            found.inputs,
            found.tokens,
            found.seconds,
            found.error,
            found.reason,
        )
        if found.failed:
            yield _failure(f"gemm:{kernel}", found)


def _measured(kernel: str, grid: Grid, task: Task, *, samples: int) -> Iterator[GemmTime]:
    return timing.measure(
        grid.shapes,
        grid.tokens,
        dtypes=grid.dtypes,
        kernels=(kernel,),
        device=task.device,
        samples=samples,
    )


def _failure(step: str, found: GemmTime) -> CheckRow:
    return CheckRow(
        step,
        f"{found.dtype}, {found.outputs} x {found.inputs}, {found.tokens} tokens",
        "FAIL",
        found.reason or "no reason",
        "report this with the name of the GPU and the versions of the packages",
    )


def speeds(rows: Sequence[GemmRow]) -> dict[GemmRow, float]:
    """Return the speed of each product relative to the dense one, where both were timed."""
    dense = {_size(row): row.median for row in rows if row.kernel == "dense" and row.seconds}
    return {
        row: dense[_size(row)] / row.median
        for row in rows
        if row.kernel != "dense" and row.seconds and _size(row) in dense
    }


def _size(row: GemmRow) -> tuple[str, int, int, int]:
    return row.dtype, row.outputs, row.inputs, row.tokens
