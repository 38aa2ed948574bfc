"""Forecast the times of a model's kernels on a GPU with the roofline model.

A kernel takes the time of its arithmetic or of its memory traffic, whichever is longer, plus a
constant (Williams, Waterman and Patterson, "Roofline", 2009; `Efficiency` has the factors):

    seconds = max(operations / (compute * peak), bytes / (bandwidth * peak bandwidth)) + kernel

Linear layers that read the same input count as one kernel; the two norms with their residuals and
the activation function as three; attention over the whole past as one. Only the last token of a
prompt gets logits. With int8 and fp8, the blocks' linear layers have weights and inputs of one
byte, and everything else stays in 16 bits.

For 2:4 there are two figures. The best case: sparse tensor cores reach twice the dense speed, and
weights are read without their zeros. The likely case is what has been reported: the arithmetic
gains less, and memory-bound kernels gain nothing, because engines then keep the dense kernels
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

# A measured product replaces the roofline for products whose m, n and k are all within this factor
# of its own.
_NEAR = 2.0


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The fractions of a GPU's published figures that real kernels reach.

    Attributes:
        compute16, compute8: fraction of the peak that large matrix products reach, in 16 and in 8
            bits.
        bandwidth: fraction of the memory bandwidth.
        kernel_seconds: constant time of a kernel: its launch, its ramp-up and its tail.
        sparse_gain: likely speedup of compute-bound products by 2:4.
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
        """Whether sparse kernels accept a matrix of these sizes."""
        return self.outputs % FRIENDLY_MULTIPLE == 0 and self.inputs % FRIENDLY_MULTIPLE == 0


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block.

    Attributes:
        gemms: the linear layers; layers that read the same input are one entry.
        widths: numbers of heads and of feed-forward channels.
        head_size: channels of one head.
        elementwise: numbers that norms, residuals and the activation function read and write for
            one token.
    """

    gemms: tuple[Gemm, ...]
    widths: Widths
    head_size: int
    elementwise: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a model.

    Attributes:
        blocks: the distinct blocks, each with the number of its occurrences.
        head: the output head, which computes the logits.
        parameters: number of all parameters.
    """

    blocks: tuple[tuple[Block, int], ...]
    head: Gemm
    parameters: int

    @property
    def block_parameters(self) -> int:
        """Number of weights in the blocks' linear layers."""
        return sum(
            count * gemm.outputs * gemm.inputs
            for block, count in self.blocks
            for gemm in block.gemms
        )

    def memory(self, dtype: str, tokens: int) -> float:
        """Bytes of the weights and of a KV cache.

        Args:
            dtype: dtype of the blocks' linear layers; everything else has 16 bits.
            tokens: number of tokens in the KV cache, over all sequences.
        """
        rest = self.parameters - self.block_parameters
        cache = sum(
            count * 2 * block.widths.kv_heads * block.head_size for block, count in self.blocks
        )
        return 2.0 * (rest + tokens * cache) + self.block_parameters * BITS[dtype] / 8


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes of one forward pass through a model.

    Attributes:
        batch: number of sequences.
        tokens: new tokens of each sequence.
        past: tokens of each sequence that are in the KV cache already.
    """

    batch: int
    tokens: int
    past: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """The work of one kernel; all figures are for one run of it.

    Attributes:
        name: names of the layers that it computes.
        times: number of runs in a pass.
        operations: floating-point or integer operations.
        weights: bytes of weights.
        traffic: bytes of activations and KV cache.
        bits: bits of each input.
        gemm: the weight matrix, if it has one.
        rows: rows of the matrix that is multiplied by the weight.
        launches: number of GPU kernels that are counted together here.
        prunable: whether the weights can be 2:4.
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
    """Measured seconds of a product [m, k] x [k, n]: dense, and with the fastest 2:4 kernel."""

    m: int
    n: int
    k: int
    dense: float
    sparse: float


@dataclass(frozen=True, slots=True)
class Layer:
    """The forecast of one kernel, over all its runs in a pass.

    Attributes:
        name: names of the layers that it computes.
        times: number of runs.
        shape: m, n and k of a matrix product; None for other kernels.
        bound: largest part of the dense kernel's time: "compute", "memory" or "launch".
        likely, best: seconds of all runs; they differ for 2:4 only.
        measured: whether the times are those of a measured product, scaled to this size.
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
    """The GPU and the arithmetic of a forecast.

    Attributes:
        gpu: the GPU that runs the model.
        dtype: dtype of the blocks' linear layers: "fp16", "bf16", "int8" or "fp8".
        measured: products that were measured on this GPU in this dtype.
        efficiency: fractions of the published figures that kernels reach.
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
    """The kernels of one forward pass, in the dtype of the blocks' linear layers."""
    rows = step.batch * step.tokens
    for block, count in model.blocks:
        for gemm in block.gemms:
            yield product(gemm, rows, dtype, count)
        width, size = block.widths, block.head_size
        # Causal attention: a new token sees half of the new tokens on average.
        seen = step.past + (step.tokens + 1) / 2
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
    """The kernel that multiplies a number of rows by a layer's weight."""
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
    """Seconds of one run for arithmetic, for memory traffic and for launches.

    Args:
        kernel: the kernel.
        setting: the GPU and the dtype.
        gain: speedup of the arithmetic by sparsity.
        stored: fraction of the weights' bytes that is stored and read.
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
    """Seconds of one run by the roofline.

    Args:
        kernel: the kernel.
        setting: the GPU and the dtype.
        gain: speedup of the arithmetic by sparsity.
        stored: fraction of the weights' bytes that is stored and read.
    """
    parts = _parts(kernel, setting, gain, stored)
    return max(parts["compute"], parts["memory"]) + parts["launch"]


def layer(kernel: Kernel, setting: Setting, *, sparse: bool) -> Layer:
    """Forecast one kernel.

    Args:
        kernel: the kernel.
        setting: the GPU, the dtype and the measured products.
        sparse: whether the weights are 2:4; without effect where sparse kernels cannot run it.
    """
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
        packed = 0.5 + 1 / kernel.bits  # half of the values, and two bits of index for each
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
    """The measured product with the most similar sizes; None if none is within `_NEAR`."""
    gemm = kernel.gemm
    assert gemm is not None

    def distances(known: Measurement) -> list[float]:
        pairs = ((known.m, kernel.rows), (known.n, gemm.outputs), (known.k, gemm.inputs))
        return [abs(math.log(one / other)) for one, other in pairs]

    near = [known for known in setting.measured if max(distances(known)) <= math.log(_NEAR) + 1e-9]
    return min(near, key=lambda known: sum(distances(known)), default=None)
