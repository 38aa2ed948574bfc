"""The state of a GPU while it works, from NVIDIA's management library (NVML)."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from thanos_deploy.gpu import driver as gpu

NOT_MEASURED = "not measured (no GPU)"

# Reasons for a lower clock that do not make a measurement invalid: an idle GPU, a clock that the
# user has set, and the power limit of the card, which it always reaches under full load.
_HARMLESS = (
    "GpuIdle",
    "ApplicationsClocksSetting",
    "UserDefinedClocks",
    "SwPowerCap",
    "None",
    "All",
)

# Largest utilisation of a GPU that counts as unused: the fraction of the last second or less in
# which a kernel ran.
MOST_BUSY = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a GPU at one moment.

    Attributes:
        clock_hz: clock of its multiprocessors.
        power_watts: power draw; None where the GPU does not report it.
        throttle_reasons: why its clock is lower than it could be, without harmless reasons.
        memory_bytes: memory that each process holds on the GPU, by process id.
        processes: ids of the processes that compute on the GPU. A process of another container
            has its id on the host or is missing. In a container with process ids of its own, that
            holds for all processes.
        used_bytes: memory in use by all processes; None where the GPU does not report it.
        busy: fraction of the last second or less in which a kernel ran; None where the GPU does
            not report it.
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
    """Peak GPU memory of some processes together.

    Attributes:
        bytes: the peak of their sum.
        by: how it was counted. "process": by the driver, for each process. "device": as the growth
            of the memory in use on the whole GPU, which includes other processes that started
            meanwhile.
    """

    bytes: int
    by: Literal["process", "device"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a GPU, and the version of its driver.

    Attributes:
        driver: version of the driver.
        power_watts: power limit; None where the GPU does not report it.
        clock_hz: highest clock of its multiprocessors.
    """

    driver: str
    power_watts: float | None
    clock_hz: float


class Monitor:
    """Reads the state of the first GPU in CUDA's order.

    CUDA_VISIBLE_DEVICES may hide and reorder GPUs for CUDA, but not for NVML.

    Attributes:
        name: product name of the GPU.
    """

    def __init__(self, nvml: Any) -> None:
        """Find the GPU; use `probe` to make a monitor.

        Args:
            nvml: the module `pynvml`, initialised.
        """
        self._nvml = nvml
        self._device = _first(nvml)
        self.name: str = nvml.nvmlDeviceGetName(self._device)

    @classmethod
    def probe(cls) -> Self | None:
        """Return a monitor; None without a GPU, or without the package nvidia-ml-py."""
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
        """Return the limits of the GPU."""
        nvml = self._nvml
        try:
            power = nvml.nvmlDeviceGetPowerManagementLimit(self._device) / 1e3
        except nvml.NVMLError:
            power = None
        clock_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(self._device, nvml.NVML_CLOCK_SM)
        return Limits(str(nvml.nvmlSystemGetDriverVersion()), power, clock_hz)

    def read(self) -> Reading:
        """Read the current state of the GPU."""
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
        """Return the answer to a query; None if the GPU does not support it."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def _first(nvml: Any) -> Any:
    """Return NVML's handle of the first GPU that is visible to CUDA."""
    visible = gpu.probe().gpus
    if not visible or nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{visible[0].uuid}")


def held(before: Reading, readings: Iterable[Reading], processes: Collection[int]) -> Held | None:
    """Return the peak GPU memory of some processes together; None where nothing reports it.

    Args:
        before: a reading from before the processes started.
        readings: readings while they ran.
        processes: ids of the processes.
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
    """Return the reasons why times on a GPU are not to be trusted; empty if there are none.

    Args:
        before: a reading from before our processes used the GPU.
        readings: readings while they used it.
        processes: ids of our processes.
    """
    found = []
    if others := _strangers(before, {os.getpid()} & {*before.processes}):
        found.append(f"before the run, {others} used the GPU")
    if before.busy is not None and before.busy > MOST_BUSY:
        found.append(
            f"the GPU was busy {before.busy:.0%} of the time before the run (limit {MOST_BUSY:.0%})"
        )
    met = dict.fromkeys(text for one in readings if (text := _strangers(one, processes)))
    found += [f"during the run, {others} used the GPU" for others in met]
    throttled = sorted({name for reading in readings for name in reading.throttle_reasons})
    if throttled:
        found.append(f"the GPU lowered its clock: {', '.join(throttled)}")
    return found


def _strangers(reading: Reading, own: Collection[int]) -> str:
    """Name the other processes that compute on the GPU; empty if none is known.

    In a container, the driver may report the process ids of the host. Our own processes then look
    like strangers, so there are other processes only if there are more strangers than processes of
    ours that were not found.
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
