"""The state of a GPU while it works, from NVIDIA's management library."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from thanos_deploy.gpu import driver as gpu

NOT_MEASURED = "not measured (no GPU)"

# Reasons to lower the clock that are no trouble: nothing to do, a clock that was asked for, and the
# power limit of the card, at which it works whenever it has much to do.
_HARMLESS = (
    "GpuIdle",
    "ApplicationsClocksSetting",
    "UserDefinedClocks",
    "SwPowerCap",
    "None",
    "All",
)

# Fraction of the last moments (up to a second) in which a kernel ran.
_MOST_BUSY = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """A GPU at one moment.

    Attributes:
        clock_hz: of its multiprocessors.
        power_watts: that it draws; None where it does not say.
        throttle_reasons: why its clock is lower than it could be.
        memory_bytes: that processes hold on it, by process number.
        processes: the numbers of all that compute on it. Those of another container, and in a
            container with process numbers of its own all, are numbers of the host or left out.
        used_bytes: of its memory, by everybody; None where it does not say.
        busy: fraction of the last moments in which a kernel ran; None likewise.
    """

    clock_hz: float
    power_watts: float | None
    throttle_reasons: tuple[str, ...]
    memory_bytes: dict[int, int]
    processes: tuple[int, ...] = ()
    used_bytes: int | None = None
    busy: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """The most memory of a GPU that some processes held.

    Attributes:
        bytes: all of them together.
        by: "process" as the driver counts it for each, or "device" for what the whole GPU had in
            use beyond what it had before, which is others' too if they came meanwhile.
    """

    bytes: int
    by: Literal["process", "device"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a GPU, and the version of its driver.

    Attributes:
        driver: its version.
        power_watts: that it may draw; None where it does not say.
        clock_hz: of its multiprocessors.
    """

    driver: str
    power_watts: float | None
    clock_hz: float


class Monitor:
    """Watches the GPU that CUDA calls the first; CUDA_VISIBLE_DEVICES may hide and reorder them.

    Attributes:
        name: its model.
    """

    def __init__(self, nvml: Any) -> None:
        """Made by `probe`.

        Args:
            nvml: the module `pynvml`, initialised.
        """
        self._nvml = nvml
        self._device = _first(nvml)
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
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
        used = self._or_none(lambda: nvml.nvmlDeviceGetMemoryInfo(device).used)
        percent = self._or_none(lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu)
        milliwatts = self._or_none(lambda: nvml.nvmlDeviceGetPowerUsage(device))
        return Reading(
            clock_hz=1e6 * nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            power_watts=None if milliwatts is None else milliwatts / 1e3,
            throttle_reasons=tuple(
                name for name, bit in names.items() if name not in _HARMLESS and reasons & bit
            ),
            memory_bytes={
                process.pid: process.usedGpuMemory
                for process in processes
                if process.usedGpuMemory is not None
            },
            processes=tuple(process.pid for process in processes),
            used_bytes=used,
            busy=None if percent is None else percent / 100,
        )

    def _or_none(self, question: Callable[[], int]) -> int | None:
        """What not every GPU answers."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _first(nvml: Any) -> Any:
    """The library's handle of the first GPU that is visible."""
    visible = gpu.probe().gpus
    if not visible or nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{visible[0].uuid}")


def held(before: Reading, readings: Iterable[Reading], processes: Collection[int]) -> Held | None:
    """The most memory that our processes held together; None where nothing says.

    Args:
        before: when they were not there yet.
        readings: while they were.
        processes: their numbers.
    """
    readings = list(readings)
    if readings and all(number in one.memory_bytes for one in readings for number in processes):
        return Held(
            max(sum(one.memory_bytes[number] for number in processes) for one in readings),
            "process",
        )
    used = [one.used_bytes for one in readings if one.used_bytes is not None]
    if before.used_bytes is None or not used:
        return None
    return Held(max(0, max(used) - before.used_bytes), "device")


def reasons(before: Reading, readings: Sequence[Reading], processes: Collection[int]) -> list[str]:
    """Why what was timed on a GPU is not to be trusted; empty if nothing speaks against it.

    Args:
        before: before anything of ours had used it.
        readings: while our processes used it.
        processes: their numbers.
    """
    found = []
    if others := _strangers(before, {os.getpid()} & {*before.processes}):
        found.append(f"before the run, {others} used the GPU")
    if before.busy is not None and before.busy > _MOST_BUSY:
        found.append(
            f"the GPU was busy {before.busy:.0%} of the time before the run "
            f"(limit {_MOST_BUSY:.0%})"
        )
    met = dict.fromkeys(text for one in readings if (text := _strangers(one, processes)))
    found += [f"during the run, {others} used the GPU" for others in met]
    throttled = sorted({name for reading in readings for name in reading.throttle_reasons})
    if throttled:
        found.append(f"the GPU lowered its clock: {', '.join(throttled)}")
    return found


def _strangers(reading: Reading, own: Collection[int]) -> str:
    """Who else computes on the GPU; empty if nobody is known to.

    Where the driver numbers processes as the host does and not as our container, ours are among
    those that look like strangers: there are others only if there are more of them than of ours.
    """
    strangers = [number for number in reading.processes if number not in own]
    unseen = [number for number in own if number not in reading.processes]
    if len(strangers) <= len(unseen):
        return ""
    if unseen:
        return f"other processes ({len(strangers) - len(unseen)})"
    return " and ".join(
        f"process {number}"
        + (f" ({size / 1e9:.1f} GB)" if (size := reading.memory_bytes.get(number)) else "")
        for number in strangers
    )
