"""The rows of a measurement run on a GPU: one frozen dataclass for each kind of row."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Literal

from thanos_deploy.check import Outcome


@dataclass(frozen=True, slots=True)
class Card:
    """The GPU of a run, with its driver and the versions of the libraries.

    Attributes:
        name: name of the GPU; in a rehearsal, of the processor.
        device: "cuda"; "cpu" in a rehearsal, whose times mean nothing.
        capability: compute capability, major and minor; (0, 0) in a rehearsal.
        memory_bytes: total memory of the device.
        driver: version of the driver; None where NVML does not tell it.
        driver_cuda: the newest CUDA version that the driver supports; None without a driver.
        torch, torch_cuda, triton, transformers, python: versions; None for a missing package.
        power_limit_watts: power limit; None where NVML does not tell it.
        most_clock_hz: highest clock of the multiprocessors; None where NVML does not tell it.
        date: date of the run in UTC, such as "2026-11-30".
        command: command that repeats the measurement.
    """

    name: str
    device: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str | None
    driver_cuda: str | None
    torch: str
    torch_cuda: str | None
    triton: str | None
    transformers: str | None
    python: str
    power_limit_watts: float | None
    most_clock_hz: float | None
    date: str
    command: str


@dataclass(frozen=True, slots=True)
class Peaks:
    """Measured peak rates of the GPU.

    Attributes:
        copy_bytes_per_second: bytes read plus bytes written by a copy that is larger than any
            cache.
        gemm_dtype, gemm_size: dtype, and number of rows and of columns, of the square matrices
            that were multiplied.
        gemm_flops_per_second: rate of that matrix product.
    """

    copy_bytes_per_second: float
    gemm_dtype: str
    gemm_size: int
    gemm_flops_per_second: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """Outcome of a step, and the state of the GPU while it ran.

    Attributes:
        step: name of the step.
        outcome: PASS, FAIL, or SKIP for a step that could not run here.
        detail: the result, or why the step failed or was skipped.
        fix: what to do next; empty where nothing is wrong.
        seconds: wall time, including the start of the step's process.
        clocks_hz: lowest and highest clock of the multiprocessors that was read; None if none was.
        throttle_reasons: why the clock was lower than it could be.
        other_processes: descriptions of the other processes that used the GPU.
    """

    step: str
    outcome: Outcome
    detail: str
    fix: str = ""
    seconds: float = 0.0
    clocks_hz: tuple[float, float] | None = None
    throttle_reasons: tuple[str, ...] = ()
    other_processes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One thing that was checked inside a step.

    Attributes:
        step: name of the step.
        name: what was checked.
        outcome, detail, fix: see `StepRow`.
    """

    step: str
    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """Error of a kernel's product x W^T against the same product in float64.

    Attributes:
        kernel: a key of `runtime.kernels.linears.MAKERS`, or "dense".
        dtype: "fp16" or "bf16".
        outputs, inputs: rows and columns of the weight W.
        tokens: rows of x.
        error: ||out - ref|| / ||ref||, Frobenius norm; None if the kernel gave no product.
        limit: largest error that passes.
        reason: why the kernel gave no product; None if it gave one.
    """

    kernel: str
    dtype: str
    outputs: int
    inputs: int
    tokens: int
    error: float | None
    limit: float
    reason: str | None = None

    @property
    def outcome(self) -> Outcome:
        """PASS or FAIL by the error; SKIP if the kernel gave no product."""
        if self.error is None:
            return "SKIP"
        return "PASS" if self.error <= self.limit else "FAIL"  # NaN fails


@dataclass(frozen=True, slots=True)
class GemmRow:
    """Times of a kernel for y = x W^T with a 2:4 weight W.

    Attributes:
        kernel, dtype, outputs, inputs, tokens: see `KernelRow`.
        seconds: time of one product, for each sample; None if it was not timed.
        error: see `KernelRow`.
        reason: why it was not timed; None if it was.
    """

    kernel: str
    dtype: str
    outputs: int
    inputs: int
    tokens: int
    seconds: tuple[float, ...] | None
    error: float | None
    reason: str | None = None

    @property
    def median(self) -> float:
        """Median time in seconds; NaN if it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class ModelRow:
    """Times of one prefill or decode step of a whole model.

    Attributes:
        model: "dense", "2:4", "structured" or "structured, 2:4".
        engine: backend and variant, such as "torch:sparse".
        dtype: "fp16" or "bf16".
        blocks: number of blocks of the model.
        parameters: number of parameters of the whole model, zeros included.
        phase: "prefill" or "decode".
        batch: number of sequences.
        tokens: tokens of each prompt in prefill; tokens in the KV cache before the timed steps in
            decode.
        seconds: time of one prefill or of one decode step, for each sample; None if it was not
            timed.
        memory_bytes: peak GPU memory of the process; None where it was not measured.
        reason: why it was not timed; None if it was.
    """

    model: str
    engine: str
    dtype: str
    blocks: int
    parameters: int
    phase: Literal["prefill", "decode"]
    batch: int
    tokens: int
    seconds: tuple[float, ...] | None
    memory_bytes: int | None
    reason: str | None = None

    @property
    def median(self) -> float:
        """Median time in seconds; NaN if it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class PruningRow:
    """Time and loss of pruning one layer.

    Attributes:
        method: pruning method, such as "thanos".
        preset: preset whose options were used, such as "fast".
        pattern: sparsity pattern, such as "2:4".
        outputs, inputs: rows and columns of the layer's weight.
        seconds: time of the solver alone; None if it failed.
        loss: output error of the pruned layer, relative to that of a layer of zeros.
        reason: why it failed; None if it did not.
    """

    method: str
    preset: str
    pattern: str
    outputs: int
    inputs: int
    seconds: float | None
    loss: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class HessianRow:
    """Time of accumulating the Hessian of a layer's inputs.

    Attributes:
        inputs: columns of the layer's weight.
        tokens: number of tokens that were added.
        seconds: time for all tokens.
    """

    inputs: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WalkRow:
    """Time and memory of pruning one block, from its inputs to those of the next block.

    Attributes:
        method, preset, pattern: see `PruningRow`.
        hidden, channels: hidden size and feed-forward channels of the block. Its other sizes are
            those of Llama 3 8B.
        tokens: number of tokens in the calibration data.
        block: index of the block.
        seconds: time by activity; see `pruning.layers.ACTIVITIES`.
        memory_bytes: peak memory of tensors on the GPU over all blocks; None without a GPU.
        host_bytes: peak host memory of the process so far.
    """

    method: str
    preset: str
    pattern: str
    hidden: int
    channels: int
    tokens: int
    block: int
    seconds: Mapping[str, float]
    memory_bytes: int | None
    host_bytes: int


Row = (
    Card
    | Peaks
    | StepRow
    | CheckRow
    | KernelRow
    | GemmRow
    | ModelRow
    | PruningRow
    | HessianRow
    | WalkRow
)

# Name of each kind of row in files.
KINDS: Mapping[str, type[Row]] = {
    "card": Card,
    "peaks": Peaks,
    "step": StepRow,
    "check": CheckRow,
    "kernel": KernelRow,
    "gemm": GemmRow,
    "model": ModelRow,
    "pruning": PruningRow,
    "hessian": HessianRow,
    "walk": WalkRow,
}
