import shutil
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.measure import paired
from thanos_deploy.measure.latency import Decode, Generate, Prefill, Scenario
from thanos_deploy.measure.messages import Ready, Reply, Request, Taken

SCENARIOS: list[Scenario] = [Prefill(1, 8), Decode(1, 8, 4), Generate(2, 5, 3)]


@pytest.mark.slow
def test_engines_take_turns_in_processes_of_their_own(exported_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported_llama, other)
    with paired.opened({"dense": exported_llama, "pruned": other}) as engines:
        assert len(set(engines.processes.values())) == 2
        used = engines.cpu_seconds
        rounds = [engines.take_turns(SCENARIOS, number) for number in range(2)]
        memory = engines.memory()
        assert engines.cpu_seconds > used
    for taken in rounds:
        assert list(taken) == [scenario.name for scenario in SCENARIOS]
        for scenario in SCENARIOS:
            assert list(taken[scenario.name]) == ["dense", "pruned"]
            for samples in taken[scenario.name].values():
                assert all(min(samples[metric]) > 0 for metric in scenario.metrics)
        assert len(taken["decode-1x8"]["dense"]["decode"]) == 4
    for label, loaded in engines.loaded.items():
        assert loaded.load_seconds > 0
        # A process with numpy and ONNX Runtime; torch alone would take more than this.
        assert 20e6 < loaded.load_peak_bytes <= memory[label].peak_bytes < 200e6
        steady = memory[label].steady_bytes
        assert steady is not None
        assert steady <= memory[label].peak_bytes


@given(st.integers(2, 6))
def test_in_the_long_run_each_is_before_each_other_as_often(count: int) -> None:
    labels = [str(number) for number in range(count)]
    orders = [paired.order(labels, number) for number in range(2 * count)]
    for one, other in combinations(labels, 2):
        before = sum(order.index(one) < order.index(other) for order in orders)
        assert before == count
    for label in labels:
        assert sum(order[0] == label for order in orders) == 2


class Fake:
    """A process whose turns take what it is told to say."""

    seconds: dict[str, list[float]]
    cpu_seconds = 0.0

    def __init__(self, bundle: Path, *_: str) -> None:
        self.name = bundle.name

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def receive(self) -> Reply:
        return Reply(Ready(1.0), 1, 1, 0.0)

    def ask(self, request: Request) -> Reply:
        return Reply(Taken({"prefill": (self.seconds[self.name].pop(0),)}), 1, 1, 0.0)


@pytest.mark.parametrize(
    ("seconds", "rounds", "stable"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, True),
        ([4.0, 2.0, 1.0, 1.0], 4, True),
        ([1.0, 3.0, 1.0, 1.0], 2, True),  # slower is not warmer
        ([8.0, 4.0, 2.0, 1.0], 4, False),
    ],
)
def test_warming_up_ends_when_nobody_gets_faster(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seconds: list[float],
    rounds: int,
    stable: bool,
) -> None:
    monkeypatch.setattr(paired, "_Worker", Fake)
    monkeypatch.setattr(Fake, "seconds", {"a": [1.0] * 4, "b": list(seconds)}, raising=False)
    with paired.opened({"a": tmp_path / "a", "b": tmp_path / "b"}) as engines:
        warm = engines.warm_up(Prefill(1, 1), at_most=4)
    assert (warm.rounds, warm.stable) == (rounds, stable)
    assert warm.last["b"] == {"prefill": [seconds[rounds - 1]]}


def test_an_engine_that_does_not_load_is_reported_as_itself(
    exported_llama: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(DeployError, match="not a bundle") as caught,
        paired.opened({"dense": exported_llama, "pruned": tmp_path}),
    ):
        pass
    assert caught.value.exit_code == 3


def test_what_an_engine_refuses_is_reported_as_itself(exported_llama: Path) -> None:
    with (
        paired.opened({"dense": exported_llama}) as engines,
        pytest.raises(DeployError, match="the export is made for at most 128") as caught,
    ):
        engines.take_turns([Prefill(1, 129)], 0)
    assert caught.value.exit_code == 2


def test_a_process_that_dies_is_an_error(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with (
        pytest.raises(PlatformError, match="ended with status 0"),
        paired.opened({"dense": exported_llama}),
    ):
        pass
