"""What NVIDIA's management library says of a GPU while it works; nothing where there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

NOT_MEASURED = "not measured (no GPU)"

# Reasons to lower the clock that are no trouble: nothing to do, and a clock that was asked for.
_HARMLESS = ("GpuIdle", "ApplicationsClocksSetting", "UserDefinedClocks", "None", "All")


@dataclass(frozen=True, slots=True)
class Reading:
    """A GPU at one moment.

    Attributes:
        clock_hz: of its multiprocessors.
        power_watts: that it draws; None where it does not say.
        throttle_reasons: why its clock is lower than it could be.
        memory_bytes: that processes hold on it, by process number.
    """

    clock_hz: float
    power_watts: float | None
    throttle_reasons: tuple[str, ...]
    memory_bytes: dict[int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a GPU may do at most, and its driver.

    Attributes:
        driver: its version.
        power_watts: that it may draw; None where it does not say.
        clock_hz: of its multiprocessors.
    """

    driver: str
    power_watts: float | None
    clock_hz: float


class Gpu:
    """The first GPU of the machine.

    Attributes:
        name: its model.
    """

    def __init__(self, nvml: Any) -> None:
        """Made by `probe`.

        Args:
            nvml: the module `pynvml`, initialised.
        """
        self._nvml = nvml
        self._device = nvml.nvmlDeviceGetHandleByIndex(0)
        self.name: str = nvml.nvmlDeviceGetName(self._device)

    @classmethod
    def probe(cls) -> Self | None:
        """The GPU; None without one, or without the package nvidia-ml-py."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml)
        except pynvml.NVMLError:
            return None

    def limits(self) -> Limits:
        """What it may do at most."""
        nvml = self._nvml
        try:
            power = nvml.nvmlDeviceGetPowerManagementLimit(self._device) / 1e3
        except nvml.NVMLError:
            power = None
        clock_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(self._device, nvml.NVML_CLOCK_SM)
        return Limits(str(nvml.nvmlSystemGetDriverVersion()), power, clock_hz)

    def read(self) -> Reading:
        """Its state now."""
        nvml, device = self._nvml, self._device
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(device)
        names = {
            name.removeprefix("nvmlClocksEventReason"): getattr(nvml, name)
            for name in dir(nvml)
            if name.startswith("nvmlClocksEventReason")
        }
        try:
            power = nvml.nvmlDeviceGetPowerUsage(device) / 1e3
        except nvml.NVMLError:
            power = None
        return Reading(
            clock_hz=1e6 * nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            power_watts=power,
            throttle_reasons=tuple(
                name for name, bit in names.items() if name not in _HARMLESS and reasons & bit
            ),
            memory_bytes={
                process.pid: process.usedGpuMemory
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)
                if process.usedGpuMemory is not None
            },
        )


def reasons(readings: Sequence[Reading]) -> list[str]:
    """Why what was timed on a GPU is not to be trusted; empty if nothing speaks against it."""
    throttled = sorted({name for reading in readings for name in reading.throttle_reasons})
    return [f"the GPU lowered its clock: {', '.join(throttled)}"] if throttled else []
