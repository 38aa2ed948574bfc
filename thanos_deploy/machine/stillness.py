"""Whether the machine was undisturbed while something was timed, from the counters of Linux.

A figure that cannot be read (another system, a container without the file, no permission) is None,
and nothing is concluded from it. Standard library only.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Fractions of all processors' time. A busy neighbour on one core of two is 0.5.
_MOST_OTHER_LOAD = 0.05
_MOST_STOLEN = 0.02

# Of the highest clock seen.
_LOWEST_CLOCK = 0.9

_TICKS = os.sysconf("SC_CLK_TCK")

# What in /proc/cpuinfo speeds up arithmetic: x86's, and Arm's names.
_ARITHMETIC = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine's counters at one moment.

    Attributes:
        time: in seconds, of a clock that only goes forward.
        own_seconds: processor time that the measured processes and this one have used.
        busy_seconds: of all processors, by everybody.
        stolen_seconds: of all processors, taken by the machine under a virtual one.
        clock_hz: mean of the processors now.
        throttle_events: how often a processor was slowed down for heat.
    """

    time: float
    own_seconds: float
    busy_seconds: float | None
    stolen_seconds: float | None
    clock_hz: float | None
    throttle_events: int | None


@dataclass(frozen=True, slots=True)
class Stillness:
    """What readings from first to last show.

    Attributes:
        other_load: fraction of all processors' time that other processes used.
        stolen: fraction that the machine under a virtual one took.
        clock_hz: lowest and highest.
        throttle_events: during the readings.
    """

    other_load: float | None
    stolen: float | None
    clock_hz: tuple[float, float] | None
    throttle_events: int | None

    @property
    def reasons(self) -> list[str]:
        """The reasons not to trust the times; empty if there are none."""
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
        own_seconds: processor time of the measured processes so far.
        root: where proc and sys are.
    """
    busy, stolen = _processor_seconds(root)
    return Reading(
        time.monotonic(), own_seconds, busy, stolen, _clock_hz(root), _throttle_events(root)
    )


def judge(readings: Sequence[Reading]) -> Stillness:
    """Compare the readings of a run, in their order; at least two."""
    first, last = readings[0], readings[-1]
    whole = (last.time - first.time) * (os.cpu_count() or 1)
    other = stolen = throttled = None
    if first.busy_seconds is not None and last.busy_seconds is not None:
        busy = last.busy_seconds - first.busy_seconds
        # The counters tick a hundred times a second, so a little less than nothing may be left.
        other = max(0.0, busy - (last.own_seconds - first.own_seconds)) / whole
    if first.stolen_seconds is not None and last.stolen_seconds is not None:
        stolen = (last.stolen_seconds - first.stolen_seconds) / whole
    if first.throttle_events is not None and last.throttle_events is not None:
        throttled = last.throttle_events - first.throttle_events
    clocks = [reading.clock_hz for reading in readings if reading.clock_hz is not None]
    return Stillness(other, stolen, (min(clocks), max(clocks)) if clocks else None, throttled)


def governor(*, root: Path = Path("/")) -> str | None:
    """What decides on the processors' clock."""
    name = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return None if name is None else name.strip()


def arithmetic_flags(*, root: Path = Path("/")) -> list[str]:
    """The processor's extensions for arithmetic on vectors and matrices."""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(flag for flag in value.split() if flag.startswith(_ARITHMETIC))
    return []


def _processor_seconds(root: Path) -> tuple[float | None, float | None]:
    """Busy and stolen time of all processors since the machine started."""
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
