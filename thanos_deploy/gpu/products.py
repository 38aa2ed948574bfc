"""Timed matrix products on a GPU: the dense kernel beside the fastest other kernel."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Time of one kernel for a product [tokens, inputs] x [inputs, outputs] on one GPU.

    Attributes:
        dtype: "fp16" or "bf16".
        kernel: `DENSE`, or the name of another kernel.
        tokens, outputs, inputs: sizes of the product.
        seconds: median time of one product.
    """

    dtype: str
    kernel: str
    tokens: int
    outputs: int
    inputs: int
    seconds: float


def beside_dense(times: Iterable[KernelTime]) -> Iterator[tuple[KernelTime, KernelTime | None]]:
    """Yield the dense kernel and the fastest other kernel for each dtype and size.

    The second is None if no other kernel was timed. If a kernel was timed twice, the later time
    counts. Sizes without a dense time are left out.
    """
    timed: dict[tuple[str, int, int, int], dict[str, KernelTime]] = {}
    for one in times:
        timed.setdefault((one.dtype, one.tokens, one.outputs, one.inputs), {})[one.kernel] = one
    for kernels in timed.values():
        dense = kernels.pop(DENSE, None)
        if dense is not None:
            yield dense, min(kernels.values(), key=lambda one: one.seconds, default=None)
