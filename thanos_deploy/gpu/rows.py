"""The rows of what is measured on a GPU, one frozen value each."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Literal

from thanos_deploy.check import Outcome


@dataclass(frozen=True, slots=True)
class Card:
    """What was measured on.

    Attributes:
        name: of the GPU; of a rehearsal, the processor.
        device: "cuda"; "cpu" for a rehearsal, of which no time means anything.
        capability: compute capability, major and minor; (0, 0) for a rehearsal.
        memory_bytes: all of its memory.
        driver: version of the driver.
        driver_cuda: the newest CUDA that the driver takes.
        torch, torch_cuda, triton, transformers, python: versions; None for what is not there.
        power_limit_watts: None where the card does not say.
        most_clock_hz: the highest clock of the multiprocessors; None likewise.
        date: of the run, in UTC, such as "2026-11-30".
        command: that measures the same again.
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
    """What the card can do at best, measured.

    Attributes:
        copy_bytes_per_second: read and written, of a copy that no cache holds.
        gemm_dtype, gemm_size: rows and columns of the square matrices that were multiplied.
        gemm_flops_per_second: of that product.
    """

    copy_bytes_per_second: float
    gemm_dtype: str
    gemm_size: int
    gemm_flops_per_second: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """How a step came out, and how the card was while it ran.

    Attributes:
        step: its name.
        outcome: PASS, FAIL, or SKIP for what could not be done here.
        detail: what was seen, or why it did not go through.
        fix: what to do next; empty where nothing is wrong.
        seconds: wall time, the start of its process included.
        clocks_hz: lowest and highest seen of the multiprocessors; None where nobody says.
        throttle_reasons: why the clock was lower than it could be.
        other_processes: what else used the GPU, one text each.
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
        step: that checked it.
        name: what was checked.
        outcome, detail, fix: as of `StepRow`.
    """

    step: str
    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel's product beside the same one in float64.

    Attributes:
        kernel: a key of `runtime.kernels.linears.MAKERS`, or "dense".
        dtype: "fp16" or "bf16".
        outputs, inputs: of the weight.
        tokens: rows of x.
        error: ||out - ref|| / ||ref||, Frobenius; None where there is no product.
        limit: what it must not exceed.
        reason: why there is no product; None where there is one.
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
        """PASS, FAIL, or SKIP for a product that the kernel does not take."""
        if self.error is None:
            return "SKIP"
        return "PASS" if self.error <= self.limit else "FAIL"  # NaN fails


@dataclass(frozen=True, slots=True)
class GemmRow:
    """y = x W^T with a 2:4 weight W, timed.

    Attributes:
        kernel, dtype, outputs, inputs, tokens: as of `KernelRow`.
        seconds: of one product, each sample; None where it was not timed.
        error: as of `KernelRow`.
        reason: why it was not timed.
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
        """Seconds; NaN where it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One pass of a whole model, timed.

    Attributes:
        model: "dense", "2:4", "structured" or "structured, 2:4".
        engine: backend and variant, such as "torch:sparse".
        dtype: "fp16" or "bf16".
        blocks: how many the model has.
        parameters: of the whole model, zeros included.
        phase: "prefill" or "decode".
        batch: sequences.
        tokens: of each prompt in prefill; before the timed steps in decode.
        seconds: of one prefill, or of one decode step; None where it was not timed.
        memory_bytes: the most that the process held on the GPU; None where nobody says.
        reason: why it was not timed.
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
        """Seconds; NaN where it was not timed."""
        return statistics.median(self.seconds) if self.seconds else nan


@dataclass(frozen=True, slots=True)
class PruningRow:
    """One layer, pruned.

    Attributes:
        method: such as "thanos".
        preset: whose options were used, such as "fast".
        pattern: such as "2:4".
        outputs, inputs: of the layer.
        seconds: of the solver alone; None where it failed.
        loss: the output error that is left, relative to that of an empty layer.
        reason: why it failed.
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
    """The statistics of a layer's inputs, summed up.

    Attributes:
        inputs: columns of the layer.
        tokens: that were added.
        seconds: in all.
    """

    inputs: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WalkRow:
    """One block of a model, pruned from its calibration data to the next block.

    Attributes:
        method, preset, pattern: as of `PruningRow`.
        hidden, channels: of the block, whose other sizes are those of Llama 3 8B.
        tokens: of calibration data.
        block: its number.
        seconds: by activity; see `pruning.layers.ACTIVITIES`.
        memory_bytes: the most that tensors held on the GPU, in all blocks; None where nobody says.
        host_bytes: the most that the process held of the host's memory so far.
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

# How each kind of row is named in files.
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
