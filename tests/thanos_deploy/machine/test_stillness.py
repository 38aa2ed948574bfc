"""The machine's own files, as a folder: what they say, and what if they do not."""

import os
from pathlib import Path

import pytest

from thanos_deploy.machine import stillness
from thanos_deploy.machine.stillness import Reading

CPUS = os.cpu_count() or 1
TICK = 1 / os.sysconf("SC_CLK_TCK")


def linux(
    root: Path, *, busy: int = 0, stolen: int = 0, khz: int = 2_000_000, hot: int = 0
) -> Path:
    """The files of a machine that has been busy for so many ticks."""
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {busy} 0 0 999 5 0 0 {stolen} 0 0\ncpu0 1 2 3\n")
    (root / "proc/cpuinfo").write_text("cpu MHz : 2100.0\nflags : fpu avx2 sse4_2 amx_tile rtm\n")
    for cpu in range(2):
        frequency = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        throttle = root / f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle"
        for folder in (frequency, throttle):
            folder.mkdir(parents=True, exist_ok=True)
        (frequency / "scaling_cur_freq").write_text(f"{khz}\n")
        (frequency / "scaling_governor").write_text("powersave\n")
        (throttle / "core_throttle_count").write_text(f"{hot}\n")
    return root


def test_the_counters_are_read(tmp_path: Path) -> None:
    root = linux(tmp_path, busy=300, stolen=20, hot=3)
    reading = stillness.read(1.5, root=root)
    assert reading.own_seconds == 1.5
    assert reading.busy_seconds == pytest.approx(300 * TICK)
    assert reading.stolen_seconds == pytest.approx(20 * TICK)
    assert reading.clock_hz == 2e9
    assert reading.throttle_events == 6
    assert stillness.governor(root=root) == "powersave"
    assert stillness.arithmetic_flags(root=root) == ["amx_tile", "avx2", "sse4_2"]


def test_without_a_governor_the_clock_is_that_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz : 2000.0\ncpu MHz : 3000.0\n")
    assert stillness.read(0.0, root=tmp_path).clock_hz == 2.5e9


def test_what_cannot_be_read_is_none_and_proves_nothing(tmp_path: Path) -> None:
    root = linux(tmp_path)
    for path in [*root.rglob("*")]:
        if path.is_file():
            path.unlink()
            path.mkdir()  # unreadable also for root
    reading = stillness.read(1.0, root=root)
    assert (reading.busy_seconds, reading.clock_hz, reading.throttle_events) == (None, None, None)
    still = stillness.judge([reading, reading, stillness.read(2.0, root=root / "nowhere")])
    assert (still.other_load, still.stolen, still.clock_hz, still.throttle_events) == (None,) * 4
    assert still.reasons == []
    assert stillness.governor(root=root) is None
    assert stillness.arithmetic_flags(root=root) == []


def reading(time: float, **changes: float | None) -> Reading:
    counters: dict[str, float | None] = {
        "own_seconds": time * CPUS,
        "busy_seconds": time * CPUS,
        "stolen_seconds": 0.0,
        "clock_hz": 3e9,
        "throttle_events": 0,
    }
    return Reading(time, **{**counters, **changes})  # type: ignore[arg-type]


def test_a_machine_that_did_nothing_else_held_still() -> None:
    still = stillness.judge([reading(0.0), reading(5.0), reading(10.0)])
    assert still.reasons == []
    assert still.other_load == 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"own_seconds": 9.0 * CPUS}, "other processes used 10.0% of the processors' time"),
        ({"stolen_seconds": 0.5 * CPUS}, "the host took 5.0% of the processors' time"),
        ({"clock_hz": 2e9}, "the processors' clock fell from 3.00 to 2.00 GHz"),
        ({"throttle_events": 4}, "the processors were throttled for heat 4 times"),
    ],
)
def test_a_machine_that_moved_is_found_out(changes: dict[str, float], reason: str) -> None:
    still = stillness.judge([reading(0.0), reading(10.0, **changes)])
    assert len(still.reasons) == 1
    assert still.reasons[0].startswith(reason)


def test_real_counters_tell_our_own_work_from_that_of_others() -> None:
    first = stillness.read(0.0)
    if first.busy_seconds is None:
        pytest.skip("this system has no /proc/stat")
    last = stillness.read(1e9)  # more than anybody can have used
    assert stillness.judge([first, last]).other_load == 0.0
