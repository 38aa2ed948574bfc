"""Matrix products that were timed on a GPU: the dense kernel beside the fastest other one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel's product [tokens, inputs] x [inputs, outputs] on one GPU.

    Attributes:
        dtype: "fp16" or "bf16".
        kernel: `DENSE`, or another.
        tokens, outputs, inputs: the sizes.
        seconds: median of one product.
    """

    dtype: str
    kernel: str
    tokens: int
    outputs: int
    inputs: int
    seconds: float


def beside_dense(times: Iterable[KernelTime]) -> Iterator[tuple[KernelTime, KernelTime | None]]:
    """The dense kernel and the fastest other, by dtype and sizes; None if there is no other.

    A kernel that was timed twice counts with the later time. What has no dense time is left out.
    """
    timed: dict[tuple[str, int, int, int], dict[str, KernelTime]] = {}
    for one in times:
        timed.setdefault((one.dtype, one.tokens, one.outputs, one.inputs), {})[one.kernel] = one
    for kernels in timed.values():
        dense = kernels.pop(DENSE, None)
        if dense is not None:
            yield dense, min(kernels.values(), key=lambda one: one.seconds, default=None)
