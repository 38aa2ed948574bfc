"""Whether the machine was undisturbed during a timed run, judged from Linux's counters.

A counter that cannot be read (another system, a container without the file, no permission) is None,
and nothing is concluded from it. Standard library only.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Limits, as fractions of all cores' time. A process that keeps one core of two busy uses 0.5.
_MOST_OTHER_LOAD = 0.05
_MOST_STOLEN = 0.02

# Limit of the lowest clock, as a fraction of the highest clock of the run.
_LOWEST_CLOCK = 0.9

_TICKS = os.sysconf("SC_CLK_TCK")

# How the names of vector and matrix extensions in /proc/cpuinfo begin, on x86 and on Arm.
_ARITHMETIC = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine's counters at one moment.

    Attributes:
        time: seconds of a monotonic clock.
        own_seconds: CPU time that the measured processes and this process have used.
        busy_seconds: CPU time that all processes have used, over all cores.
        stolen_seconds: CPU time that the hypervisor has taken from this virtual machine, over all
            cores.
        clock_hz: mean clock of the cores at this moment.
        throttle_events: number of times that a core was throttled because of heat.
    """

    time: float
    own_seconds: float
    busy_seconds: float | None
    stolen_seconds: float | None
    clock_hz: float | None
    throttle_events: int | None


@dataclass(frozen=True, slots=True)
class Stillness:
    """How undisturbed the machine was from the first reading to the last.

    Attributes:
        other_load: fraction of all cores' time that other processes used.
        stolen: fraction of all cores' time that the hypervisor took from this virtual machine.
        clock_hz: lowest and highest clock of the readings.
        throttle_events: number of thermal throttle events during the run.
    """

    other_load: float | None
    stolen: float | None
    clock_hz: tuple[float, float] | None
    throttle_events: int | None

    @property
    def reasons(self) -> list[str]:
        """The reasons not to trust the measured times; empty if there are none."""
        found = []
        if self.other_load is not None and self.other_load > _MOST_OTHER_LOAD:
            found.append(
                f"other processes used {self.other_load:.1%} of the processors' time "
                f"(limit {_MOST_OTHER_LOAD:.0%})"
            )
        if self.stolen is not None and self.stolen > _MOST_STOLEN:
            found.append(
                f"the host took {self.stolen:.1%} of the processors' time "
                f"(limit {_MOST_STOLEN:.0%})"
            )
        if self.clock_hz is not None and self.clock_hz[0] < _LOWEST_CLOCK * self.clock_hz[1]:
            low, high = self.clock_hz
            found.append(f"the processors' clock fell from {high / 1e9:.2f} to {low / 1e9:.2f} GHz")
        if self.throttle_events:
            found.append(f"the processors were throttled for heat {self.throttle_events} times")
        return found


def read(own_seconds: float, *, root: Path = Path("/")) -> Reading:
    """Read the counters.

    Args:
        own_seconds: CPU time of the measured processes and this one so far.
        root: folder that contains `proc` and `sys`.
    """
    busy, stolen = _processor_seconds(root)
    return Reading(
        time.monotonic(), own_seconds, busy, stolen, _clock_hz(root), _throttle_events(root)
    )


def judge(readings: Sequence[Reading]) -> Stillness:
    """Judge a run by its readings: at least two, in chronological order."""
    first, last = readings[0], readings[-1]
    whole = (last.time - first.time) * (os.cpu_count() or 1)
    other = stolen = throttled = None
    if first.busy_seconds is not None and last.busy_seconds is not None:
        busy = last.busy_seconds - first.busy_seconds
        # The counters have a coarse tick (mostly 10 ms), so this may be slightly negative.
        other = max(0.0, busy - (last.own_seconds - first.own_seconds)) / whole
    if first.stolen_seconds is not None and last.stolen_seconds is not None:
        stolen = (last.stolen_seconds - first.stolen_seconds) / whole
    if first.throttle_events is not None and last.throttle_events is not None:
        throttled = last.throttle_events - first.throttle_events
    clocks = [reading.clock_hz for reading in readings if reading.clock_hz is not None]
    return Stillness(other, stolen, (min(clocks), max(clocks)) if clocks else None, throttled)


def governor(*, root: Path = Path("/")) -> str | None:
    """The Linux frequency governor of the first core, which decides on its clock."""
    name = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return None if name is None else name.strip()


def arithmetic_flags(*, root: Path = Path("/")) -> list[str]:
    """The processor's vector and matrix extensions, such as avx512f."""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(flag for flag in value.split() if flag.startswith(_ARITHMETIC))
    return []


def _processor_seconds(root: Path) -> tuple[float | None, float | None]:
    """Busy and stolen seconds of all cores since the machine started."""
    for line in (_text(root / "proc/stat") or "").splitlines():
        if line.startswith("cpu "):
            user, nice, system, _, _, interrupts, soft, stolen = map(int, line.split()[1:9])
            return (user + nice + system + interrupts + soft) / _TICKS, stolen / _TICKS
    return None, None


def _clock_hz(root: Path) -> float | None:
    cpus = root / "sys/devices/system/cpu"
    kilohertz = [_text(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if found := [1e3 * float(text) for text in kilohertz if text is not None]:
        return statistics.mean(found)
    megahertz = [
        1e6 * float(line.partition(":")[2])
        for line in (_text(root / "proc/cpuinfo") or "").splitlines()
        if line.startswith("cpu MHz")
    ]
    return statistics.mean(megahertz) if megahertz else None


def _throttle_events(root: Path) -> int | None:
    cpus = root / "sys/devices/system/cpu"
    counts = [_text(path) for path in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    found = [int(text) for text in counts if text is not None]
    return sum(found) if found else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
