"""What is read of a GPU. There is none here, so the library is a stand-in with its names."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from thanos_deploy import nvml
from thanos_deploy.nvml import Gpu


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
        "nvmlClocksEventReasonSwThermalSlowdown": 32,
        "nvmlClocksEventReasonAll": 255,
        "nvmlInit": init,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda device: "a GPU",
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: reasons,
        "nvmlDeviceGetClockInfo": lambda device, kind: 1500,
        "nvmlDeviceGetPowerUsage": no_power,
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
    assert Gpu.probe() is None


def test_a_gpu_that_slows_down_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(reasons=1 | 32))
    device = Gpu.probe()
    assert device is not None
    assert device.name == "a GPU"
    reading = device.read()
    assert reading.clock_hz == 1.5e9
    assert reading.power_watts is None
    assert reading.memory_bytes == {7: 100}
    assert nvml.reasons([reading]) == ["the GPU lowered its clock: SwThermalSlowdown"]


def test_an_idle_gpu_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(reasons=1))
    device = Gpu.probe()
    assert device is not None
    assert nvml.reasons([device.read()]) == []


def test_the_real_library_has_the_names_that_are_used() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert all(hasattr(pynvml, name) for name in vars(library()) if "nvml" in name.lower())
