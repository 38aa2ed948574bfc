import time

import numpy as np
import pytest

from thanos_deploy.measure import messages
from thanos_deploy.measure.latency import Decode, Generate, OpenLoop, Prefill, Scenario
from thanos_deploy.measure.messages import Request, Turn


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


ALL: list[Scenario] = [
    Prefill(batch=2, prompt=7),
    Decode(batch=2, past=9, new_tokens=3),
    Generate(batch=2, prompt=7, new_tokens=3),
    OpenLoop(prompt=7, new_tokens=3, requests=2, offered_per_second=50.0),
]


def test_prefill_times_one_prefill() -> None:
    engine = Sleeper()
    (seconds,) = Prefill(batch=2, prompt=7).take(engine, 0)["prefill"]
    assert engine.calls == [(2, 7)]
    assert seconds >= 0.03


def test_decode_times_every_step_and_not_what_was_before() -> None:
    engine = Sleeper()
    seconds = Decode(batch=2, past=9, new_tokens=3).take(engine, 0)["decode"]
    assert engine.calls == [(2, 9), (2,), (2,), (2,)]
    assert len(seconds) == 3
    assert min(seconds) >= 0.01


def test_the_times_of_an_answer_add_up() -> None:
    engine = Sleeper()
    samples = Generate(batch=2, prompt=7, new_tokens=3).take(engine, 0)
    assert engine.calls == [(2, 7), (2,), (2,)]  # the last token is not read any more
    (first,), (total,) = samples["ttft"], samples["total"]
    assert first >= 0.03
    assert len(samples["inter_token"]) == 2
    assert min(samples["inter_token"]) >= 0.01
    assert first + sum(samples["inter_token"]) == pytest.approx(total)
    assert samples["tokens_per_second"] == [pytest.approx(2 * 3 / total)]


def test_an_open_loop_counts_the_time_that_a_request_waits() -> None:
    """Ten times as many requests a second as can be answered: the last waits for all before."""
    engine = Sleeper()
    scenario = OpenLoop(prompt=7, new_tokens=2, requests=4, offered_per_second=250.0)
    samples = scenario.take(engine, 0)
    assert engine.calls == [(1, 7), (1,)] * 4
    assert all(
        request > first for first, request in zip(samples["ttft"], samples["request"], strict=True)
    )
    assert samples["request"] == sorted(samples["request"])
    (span,) = samples["span"]
    assert span >= 4 * 0.04


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.kind)
def test_a_scenario_has_samples_of_every_metric_and_survives_json(scenario: Scenario) -> None:
    request = Request(Turn(scenario, 3))
    assert messages.request(messages.line(request)) == request
    samples = scenario.take(Sleeper(), 0)
    assert all(samples[metric] for metric in scenario.metrics)
    assert scenario.headline in scenario.metrics


def test_scenarios_are_told_apart_by_name() -> None:
    grid = [
        scenario
        for batch in (1, 2)
        for length in (1, 12)
        for scenario in (
            Prefill(batch, length),
            Decode(batch, length, 2),
            Generate(batch, length, 2),
        )
    ]
    assert len({scenario.name for scenario in grid}) == len(grid)
