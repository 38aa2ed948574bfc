"""Forecast how long the kernels of a model take on a GPU: a roofline.

A kernel takes as long as its arithmetic or its memory traffic, whichever is longer, and a constant
(Williams, Waterman and Patterson, "Roofline", 2009; `Efficiency` has the factors):

    seconds = max(operations / (compute * peak), bytes / (bandwidth * peak bandwidth)) + kernel

Layers that read the same input are one kernel; norms with their residuals and the activation
function are three; attention is one, over the whole past. Only the last token of a prompt gets
logits. With int8 and fp8 the blocks' linear layers have weights and inputs of one byte, and
everything else stays in 16 bits.

For 2:4 there are two figures. At best, sparse tensor cores reach twice the dense speed and weights
are read without their zeros. Likely is what has been reported: arithmetic is faster by less, and
kernels that wait for memory gain nothing, because engines then keep the dense ones
(TensorRT-LLM#1802, pytorch#153825).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from thanos_deploy.errors import UsageError
from thanos_deploy.forecast.datasheets import SPARSE_FACTOR, Datasheet
from thanos_deploy.model.widths import Widths
from thanos_deploy.shrink.steps import FRIENDLY_MULTIPLE

BITS = {"fp16": 16, "bf16": 16, "int8": 8, "fp8": 8}

# A measured product stands for those whose sizes are all within this factor of its own.
_NEAR = 2.0


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The fractions of the published figures that real kernels reach.

    Attributes:
        compute16, compute8: fraction of the peak that large matrix products reach, by bits.
        bandwidth: fraction of the memory bandwidth.
        kernel_seconds: what a kernel takes beside: its launch, its ramp-up and its tail.
        sparse_gain: how much faster 2:4 kernels are where arithmetic is what takes the time.
    """

    compute16: float
    compute8: float
    bandwidth: float
    kernel_seconds: float
    sparse_gain: float


# Fitted to seven published figures and checked on others by benchmarks/forecast.py.
FITTED = Efficiency(
    compute16=0.70, compute8=0.55, bandwidth=0.84, kernel_seconds=8.1e-6, sparse_gain=1.29
)


@dataclass(frozen=True, slots=True)
class Gemm:
    """A weight matrix [outputs, inputs] of one layer, or of several that read the same input."""

    name: str
    outputs: int
    inputs: int

    @property
    def takes_sparsity(self) -> bool:
        """Sparse kernels accept the sizes."""
        return self.outputs % FRIENDLY_MULTIPLE == 0 and self.inputs % FRIENDLY_MULTIPLE == 0


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block.

    Attributes:
        gemms: its linear layers.
        widths: heads and channels.
        head_size: channels of one head.
        elementwise: numbers that norms, residuals and activation read and write for one token.
    """

    gemms: tuple[Gemm, ...]
    widths: Widths
    head_size: int
    elementwise: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a model.

    Attributes:
        blocks: each kind of block, and how many of it there are.
        head: the layer that makes the logits.
        parameters: all of them.
    """

    blocks: tuple[tuple[Block, int], ...]
    head: Gemm
    parameters: int

    @property
    def block_parameters(self) -> int:
        """Weights of the blocks' linear layers."""
        return sum(
            count * gemm.outputs * gemm.inputs
            for block, count in self.blocks
            for gemm in block.gemms
        )

    def memory(self, dtype: str, tokens: int) -> float:
        """Bytes of the weights, and of the kv cache of so many tokens."""
        rest = self.parameters - self.block_parameters
        cache = sum(
            count * 2 * block.widths.kv_heads * block.head_size for block, count in self.blocks
        )
        return 2.0 * (rest + tokens * cache) + self.block_parameters * BITS[dtype] / 8


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through a model.

    Attributes:
        batch: sequences.
        tokens: new ones of each.
        past: tokens of each that are in the kv cache.
    """

    batch: int
    tokens: int
    past: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel does.

    Attributes:
        name: of the layers.
        times: how often it runs in a pass.
        operations: floating-point or integer.
        weights: bytes that sparsity could halve.
        traffic: bytes of activations and cache.
        bits: of its inputs.
        gemm: its weight matrix, if it has one.
        rows: of what is multiplied by it.
        launches: kernels that it really is.
        prunable: its weights can be 2:4.
    """

    name: str
    times: int
    operations: float
    weights: float
    traffic: float
    bits: int = 16
    gemm: Gemm | None = None
    rows: int = 0
    launches: int = 1
    prunable: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of a product [m, k] x [k, n] on a GPU: dense, and with the fastest 2:4 kernel."""

    m: int
    n: int
    k: int
    dense: float
    sparse: float


@dataclass(frozen=True, slots=True)
class Layer:
    """The forecast of one kernel, over all blocks.

    Attributes:
        name: of the layers.
        times: how often it runs.
        shape: m, n and k of a product.
        bound: what takes the time when it is dense: "compute", "memory" or "launch".
        likely, best: seconds of all runs; they differ for 2:4 only.
        measured: a measured product stands for it.
    """

    name: str
    times: int
    shape: tuple[int, int, int] | None
    bound: str
    likely: float
    best: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """What a forecast is for.

    Attributes:
        gpu: to run on.
        dtype: of the blocks' linear layers: "fp16", "bf16", "int8" or "fp8".
        measured: products that were measured there.
        efficiency: of the GPU.
    """

    gpu: Datasheet
    dtype: str
    measured: tuple[Measurement, ...] = ()
    efficiency: Efficiency = FITTED

    def __post_init__(self) -> None:
        if self.dtype not in self.gpu.peak:
            raise UsageError(
                f"{self.gpu.name} has no tensor cores for {self.dtype}",
                fix=f"use one of {', '.join(self.gpu.peak)}",
            )


def kernels(model: Architecture, step: Step, dtype: str) -> Iterator[Kernel]:
    """What one pass computes."""
    rows = step.batch * step.tokens
    for block, count in model.blocks:
        for gemm in block.gemms:
            yield product(gemm, rows, dtype, count)
        width, size = block.widths, block.head_size
        seen = step.past + (step.tokens + 1) / 2  # causal: half of the new ones on average
        cached = 2 * step.batch * (step.past + step.tokens) * width.kv_heads * size
        yield Kernel(
            "attention",
            count,
            operations=4.0 * rows * seen * width.heads * size,
            weights=0.0,
            traffic=2.0 * (2 * rows * width.heads * size + cached),
        )
        elementwise = 2.0 * rows * block.elementwise
        yield Kernel("norms, activation", count, 0.0, 0.0, elementwise, launches=3)
    yield product(model.head, step.batch, "fp16", prunable=False)


def product(gemm: Gemm, rows: int, dtype: str, times: int = 1, *, prunable: bool = True) -> Kernel:
    """A matrix product, of a number of rows with a layer's weight."""
    bits = BITS[dtype]
    return Kernel(
        gemm.name,
        times,
        operations=2.0 * rows * gemm.outputs * gemm.inputs,
        weights=gemm.outputs * gemm.inputs * bits / 8,
        traffic=rows * (gemm.inputs * bits / 8 + 2.0 * gemm.outputs),
        bits=bits,
        gemm=gemm,
        rows=rows,
        prunable=prunable,
    )


def _parts(
    kernel: Kernel, setting: Setting, gain: float = 1.0, stored: float = 1.0
) -> dict[str, float]:
    """Seconds of one run that go to arithmetic, to memory and to the launch.

    Args:
        kernel: what runs.
        setting: on what.
        gain: what sparsity multiplies the speed of the arithmetic by.
        stored: fraction of the weights' bytes that are read.
    """
    gpu, reached = setting.gpu, setting.efficiency
    peak = (
        reached.compute8 * gpu.peak[setting.dtype]
        if kernel.bits == 8
        else reached.compute16 * gpu.peak["fp16"]
    )
    moved = kernel.weights * stored + kernel.traffic
    return {
        "compute": kernel.operations / (peak * gain),
        "memory": moved / (reached.bandwidth * gpu.bandwidth),
        "launch": kernel.launches * reached.kernel_seconds,
    }


def seconds(kernel: Kernel, setting: Setting, gain: float = 1.0, stored: float = 1.0) -> float:
    """Seconds of one run by the roofline; see `_parts` for the arguments."""
    parts = _parts(kernel, setting, gain, stored)
    return max(parts["compute"], parts["memory"]) + parts["launch"]


def layer(kernel: Kernel, setting: Setting, *, sparse: bool) -> Layer:
    """The forecast of one kernel."""
    parts, gemm = _parts(kernel, setting), kernel.gemm
    dense = seconds(kernel, setting)
    sparse = sparse and kernel.prunable and gemm is not None and gemm.takes_sparsity
    measurement = _nearest(kernel, setting) if kernel.prunable else None
    if measurement is not None:
        weight = Gemm("", measurement.n, measurement.k)
        known = product(weight, measurement.m, setting.dtype)
        took = min(measurement.sparse, measurement.dense) if sparse else measurement.dense
        likely = best = took * dense / seconds(known, setting)
    elif sparse:
        likely = seconds(kernel, setting, gain=setting.efficiency.sparse_gain)
        packed = 0.5 + 1 / kernel.bits  # half of the values, and two bits for each
        best = seconds(kernel, setting, gain=SPARSE_FACTOR, stored=packed)
    else:
        likely = best = dense
    return Layer(
        name=kernel.name,
        times=kernel.times,
        shape=None if gemm is None else (kernel.rows, gemm.outputs, gemm.inputs),
        bound=max(parts, key=lambda name: parts[name]),
        likely=kernel.times * likely,
        best=kernel.times * best,
        measured=measurement is not None,
    )


def _nearest(kernel: Kernel, setting: Setting) -> Measurement | None:
    """The measured product with the most similar sizes, if all of them are near."""
    gemm = kernel.gemm
    assert gemm is not None

    def distances(known: Measurement) -> list[float]:
        pairs = ((known.m, kernel.rows), (known.n, gemm.outputs), (known.k, gemm.inputs))
        return [abs(math.log(one / other)) for one, other in pairs]

    near = [known for known in setting.measured if max(distances(known)) <= math.log(_NEAR) + 1e-9]
    return min(near, key=lambda known: sum(distances(known)), default=None)
