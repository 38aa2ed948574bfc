"""What is read of a GPU. There is none here, so the library is a stand-in with its names."""

import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from thanos_deploy.gpu import driver, nvml
from thanos_deploy.gpu.nvml import Held, Monitor, Reading, held


class NVMLError(Exception):
    pass


def library(*, reasons: int = 0, devices: int = 1) -> ModuleType:
    """Such of pynvml as is used."""
    module = ModuleType("pynvml")

    def init() -> None:
        if not devices:
            raise NVMLError

    def no_power(device: object) -> int:
        raise NVMLError

    for name, value in {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "nvmlClocksEventReasonGpuIdle": 1,
        "nvmlClocksEventReasonSwPowerCap": 4,
        "nvmlClocksEventReasonSwThermalSlowdown": 32,
        "nvmlClocksEventReasonAll": 255,
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: devices,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda device: f"GPU {device}",
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: reasons,
        "nvmlDeviceGetClockInfo": lambda device, kind: 1500,
        "nvmlDeviceGetPowerUsage": no_power,
        "nvmlDeviceGetPowerManagementLimit": lambda device: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda device, kind: 1980,
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=500),
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=34),
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [
            SimpleNamespace(pid=7, usedGpuMemory=100),
            SimpleNamespace(pid=8, usedGpuMemory=None),
        ],
    }.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("module", [None, library(devices=0)], ids=["no package", "no driver"])
def test_without_a_gpu_there_is_none(
    module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert Monitor.probe() is None


def test_what_a_gpu_may_do_at_most_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    device = Monitor.probe()
    assert device is not None
    assert device.limits() == nvml.Limits("580.159.04", 700.0, 1.98e9)


def test_a_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(reasons=1 | 4 | 32))
    device = Monitor.probe()
    assert device is not None
    assert device.name == "GPU 0"
    reading = device.read()
    assert reading.clock_hz == 1.5e9
    assert reading.power_watts is None
    assert reading.memory_bytes == {7: 100}
    assert reading.processes == (7, 8)
    assert reading.used_bytes == 500
    assert reading.busy == 0.34
    assert reading.throttle_reasons == ("SwThermalSlowdown",)


@pytest.mark.parametrize(
    ("devices", "visible", "name"),
    [(1, ["b"], "GPU 0"), (2, ["b", "a"], "GPU GPU-b"), (2, [], "GPU 0")],
)
def test_the_gpu_is_the_one_that_cuda_calls_the_first(
    monkeypatch: pytest.MonkeyPatch, devices: int, visible: list[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(devices=devices))
    found = tuple(driver.Gpu("H100", (9, 0), 80 * 10**9, uuid) for uuid in visible)
    monkeypatch.setattr(driver, "probe", lambda: driver.Driver("13.0", found, ""))
    device = Monitor.probe()
    assert device is not None
    assert device.name == name


QUIET = Reading(1.5e9, None, (), {}, (), 300, 0.0)
OURS = replace(QUIET, memory_bytes={7: 100, 8: 50}, processes=(7, 8), used_bytes=450, busy=1.0)
# As a container with process numbers of its own sees the two.
NUMBERED_OTHERWISE = replace(OURS, memory_bytes={4711: 100, 4712: 50}, processes=(4711, 4712))
HIDDEN = replace(OURS, memory_bytes={}, processes=())


@pytest.mark.parametrize("during", [OURS, NUMBERED_OTHERWISE, HIDDEN])
def test_a_gpu_that_is_ours_alone_is_no_reason(during: Reading) -> None:
    assert nvml.reasons(QUIET, [during, during], {7, 8}) == []
    used_by_us = replace(QUIET, processes=(os.getpid(),))
    assert nvml.reasons(used_by_us, [during], {7, 8}) == []


@pytest.mark.parametrize(
    ("before", "during", "reason"),
    [
        (
            replace(QUIET, processes=(5, 6), memory_bytes={5: 4 * 10**9}),
            OURS,
            "before the run, process 5 (4.0 GB) and process 6 used the GPU",
        ),
        (
            replace(QUIET, busy=0.34),
            OURS,
            "the GPU was busy 34% of the time before the run (limit 5%)",
        ),
        (
            QUIET,
            replace(OURS, processes=(7, 8, 9)),
            "during the run, process 9 used the GPU",
        ),
        (
            QUIET,
            replace(NUMBERED_OTHERWISE, processes=(4711, 4712, 4713)),
            "during the run, other processes (1) used the GPU",
        ),
        (
            QUIET,
            replace(OURS, throttle_reasons=("SwThermalSlowdown",)),
            "the GPU lowered its clock: SwThermalSlowdown",
        ),
    ],
)
def test_others_heat_and_load_are_reasons(before: Reading, during: Reading, reason: str) -> None:
    assert nvml.reasons(before, [OURS, during, during], {7, 8}) == [reason]


def test_memory_is_by_process_where_the_driver_knows_ours_and_else_of_the_whole_gpu() -> None:
    later = replace(OURS, memory_bytes={7: 120, 8: 40}, used_bytes=470)
    assert held(QUIET, [OURS, later], {7}) == Held(120, "process")
    assert held(QUIET, [OURS, later], {7, 8}) == Held(160, "process")
    for unknown in (NUMBERED_OTHERWISE, HIDDEN):
        assert held(QUIET, [unknown, later], {7, 8}) == Held(170, "device")
    assert held(replace(QUIET, used_bytes=None), [HIDDEN], {7}) is None
    assert held(QUIET, [replace(HIDDEN, used_bytes=None)], {7}) is None
    assert held(QUIET, [], {7}) is None


def test_the_real_library_has_the_names_that_are_used() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert all(hasattr(pynvml, name) for name in vars(library()) if "nvml" in name.lower())
