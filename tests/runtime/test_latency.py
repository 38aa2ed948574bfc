import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runtime import paired
from runtime.latency import LatencySamples, Workload, measure, speedup, summarise
from thanos_deploy.errors import DeployError, PlatformError


class Sleeper:
    """An engine that takes a known time and notes what it is asked."""

    max_sequence = 1000

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.calls.append(ids.shape)
        time.sleep(0.03)
        return np.zeros((len(ids), 5), dtype=np.float32)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(ids.shape)
        time.sleep(0.01)
        return np.zeros((len(ids), 5), dtype=np.float32)


def test_measuring_times_one_prefill_and_every_decode_step() -> None:
    engine = Sleeper()
    samples = measure(engine, Workload(batch=2, prompt=7, new_tokens=3))
    assert engine.calls == [(2, 7), (2,), (2,), (2,)]
    assert len(samples.prefill_seconds) == 1
    assert len(samples.decode_seconds) == 3
    assert samples.prefill_seconds[0] >= 0.03
    assert min(samples.decode_seconds) >= 0.01


def test_samples_add_up_in_order() -> None:
    total = LatencySamples((1.0,), (2.0,)) + LatencySamples((3.0,), (4.0, 5.0))
    assert total == LatencySamples((1.0, 3.0), (2.0, 4.0, 5.0))


def test_a_summary_is_the_median_and_the_tail() -> None:
    summary = summarise(tuple(float(i) for i in range(1, 102)))
    assert (summary.count, summary.median, summary.p90, summary.p99) == (101, 51.0, 91.0, 100.0)


def test_a_speedup_is_taken_round_by_round() -> None:
    """The second round is ten times as slow for both, and the ratio does not notice."""
    dense = (1.0, 3.0, 10.0, 30.0, 1.0, 1.0)
    pruned = (1.0, 1.0, 10.0, 10.0, 1.0, 3.0)
    result = speedup(dense, pruned, rounds=3)
    assert (result.median, result.lowest, result.highest) == (2.0, 0.5, 2.0)


def test_engines_are_compared_in_processes_of_their_own(
    exported_llama: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported_llama, other)
    progress: list[tuple[int, int]] = []
    measured = paired.compare(
        {"dense": exported_llama, "pruned": other},
        Workload(batch=1, prompt=8, new_tokens=4),
        rounds=3,
        warmup=1,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert list(measured) == ["dense", "pruned"]
    assert progress == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for measurement in measured.values():
        assert len(measurement.samples.prefill_seconds) == 3
        assert len(measurement.samples.decode_seconds) == 12
        assert min(measurement.samples.decode_seconds) > 0
        assert measurement.load_seconds > 0
        # A process with numpy and ONNX Runtime; torch alone would take more than this.
        assert 20e6 < measurement.loaded_memory_bytes <= measurement.peak_memory_bytes < 200e6


def test_the_order_is_reversed_every_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    class Fake:
        def __init__(self, bundle: Path, backend: str) -> None:
            self.name = bundle.name

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def receive(self) -> dict[str, float]:
            return {"load_seconds": 1.0, "peak_memory_bytes": 1}

        def ask(self, request: dict[str, int]) -> dict[str, object]:
            if request:
                asked.append(self.name)
            return {"prefill_seconds": [1.0], "decode_seconds": [1.0], "peak_memory_bytes": 2}

    monkeypatch.setattr(paired, "_Worker", Fake)
    paired.compare(
        {"a": tmp_path / "a", "b": tmp_path / "b"}, Workload(1, 1, 1), rounds=2, warmup=1
    )
    assert asked == ["a", "b", "b", "a", "a", "b"]


def test_an_engine_that_does_not_load_is_reported_as_itself(
    exported_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeployError, match="not a bundle") as caught:
        paired.compare(
            {"dense": exported_llama, "pruned": tmp_path}, Workload(1, 1, 1), rounds=1, warmup=0
        )
    assert caught.value.exit_code == 3


def test_a_process_that_dies_is_an_error(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(PlatformError, match="ended with status 0"):
        paired.compare({"dense": exported_llama}, Workload(1, 1, 1), rounds=1, warmup=0)
