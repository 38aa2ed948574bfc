"""What is said of a machine. What is installed, and the driver, are stand-ins."""

from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporters import packages, preflight
from thanos_deploy.check import Check, passed
from thanos_deploy.gpu import driver as gpu
from thanos_deploy.gpu.driver import Driver, Gpu

H100 = Gpu("H100", (9, 0), 80 * 10**9)
T4 = Gpu("T4", (7, 5), 16 * 10**9)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions and their versions; to be filled."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(preflight, "_version", versions.get)
    return versions


def named(name: str) -> list[Check]:
    return [check for check in preflight.checks() if check.name == name]


@pytest.mark.parametrize(
    ("versions", "outcome", "on_cuda"),
    [
        ({}, "SKIP", []),
        ({"onnxruntime": "1.30.0"}, "PASS", ["SKIP"]),
        ({"onnxruntime-gpu": "1.31.1"}, "PASS", []),
        ({"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"}, "FAIL", []),
    ],
)
def test_one_onnxruntime_is_fine_and_two_are_not(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    outcome: str,
    on_cuda: list[str],
) -> None:
    monkeypatch.setattr(gpu, "probe", lambda: Driver(None, (), "no driver"))
    installed |= versions
    (check,) = named("ONNX Runtime")
    assert check.outcome == outcome
    assert bool(check.fix) == (outcome != "PASS")
    assert all(version in check.detail for version in versions.values())
    found = named("ONNX Runtime on CUDA")
    assert [check.outcome for check in found] == on_cuda
    assert all("pip install onnxruntime-gpu" in check.fix for check in found)
    assert passed(preflight.checks()) == (outcome != "FAIL")


@pytest.mark.parametrize(
    ("tensorrt", "linked", "outcome", "said"),
    [
        (None, b"", "SKIP", "no TensorRT"),
        ("10.16.1", b"libcudart.so.13\0libnvinfer.so.10\0", "PASS", "TensorRT 10.16.1"),
        ("42.0", b"libnvinfer.so.10\0", "FAIL", "linked against TensorRT 10"),
        ("42.0", b"names nothing", "SKIP", "unknown whether they fit together"),
        ("42.0", None, "SKIP", "unknown whether they fit together"),
    ],
)
def test_tensorrt_passes_only_if_the_provider_names_its_version(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tensorrt: str | None,
    linked: bytes | None,
    outcome: str,
    said: str,
) -> None:
    installed["onnxruntime-gpu"] = "99.0"

    def load(name: str) -> SimpleNamespace:
        if tensorrt is None:
            raise ImportError
        return SimpleNamespace(__version__=tensorrt)

    (tmp_path / "capi").mkdir()
    if linked is not None:
        (tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(linked)
    package = ModuleSpec("onnxruntime", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(packages, "load", load)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    (check,) = named("ONNX Runtime with TensorRT")
    assert (check.outcome, said in check.detail) == (outcome, True), check


def test_the_installed_provider_says_what_it_is_linked_against() -> None:
    assert preflight._linked_tensorrt() == "10"


@pytest.mark.parametrize(
    ("built_with", "driver", "outcome", "said"),
    [
        ("13.0", "13.0", "PASS", "the driver takes CUDA 13.0"),
        ("12.8", "13.0", "PASS", "the driver takes CUDA 13.0"),
        ("12.10", "12.9", "PASS", "refuses newer PTX"),
        ("13.0", "12.9", "FAIL", "built with CUDA 13.0, the driver takes CUDA 12.9"),
    ],
)
def test_a_driver_too_old_for_a_library_is_found_out(
    monkeypatch: pytest.MonkeyPatch, built_with: str, driver: str, outcome: str, said: str
) -> None:
    monkeypatch.setattr(gpu, "probe", lambda: Driver(driver, (H100,), ""))
    monkeypatch.setattr(preflight, "_cuda_of_torch", lambda: built_with)
    monkeypatch.setattr(preflight, "_cuda_of_ort", lambda: None)
    (check,) = named("PyTorch on CUDA")
    assert (check.outcome, said in check.detail) == (outcome, True), check
    assert bool(check.fix) == (outcome == "FAIL")


def test_a_library_that_knows_no_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "probe", lambda: Driver("13.0", (H100,), ""))
    monkeypatch.setattr(preflight, "_cuda_of_torch", lambda: None)
    (check,) = named("PyTorch on CUDA")
    assert (check.outcome, "has no CUDA" in check.detail, bool(check.fix)) == ("SKIP", True, True)


def test_a_gpu_without_sparse_tensor_cores_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "probe", lambda: Driver("13.0", (H100, T4), ""))
    assert [named(f"GPU {n}: sparse tensor cores")[0].outcome for n in (0, 1)] == ["PASS", "FAIL"]
    assert "8.0 or later" in named("GPU 1: sparse tensor cores")[0].fix
