import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from thanos_deploy.measure import traffic

PREFILL, DECODE = 0.02, 0.01


def answer() -> Iterator[int]:
    """Two tokens that take a known time."""
    time.sleep(PREFILL)
    yield 0
    time.sleep(DECODE)
    yield 1


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff(traffic.arrivals(4000, 8.0, seed=1))
    # Exponential: the standard deviation is the mean, and 1 - 1/e of all gaps are below it.
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.05)
    assert (gaps < 1 / 8).mean() == pytest.approx(1 - np.exp(-1), abs=0.02)


def test_arrivals_begin_at_once_and_depend_on_the_seed_alone() -> None:
    assert traffic.arrivals(5, 2.0, seed=3) == traffic.arrivals(5, 2.0, seed=3)
    assert traffic.arrivals(5, 2.0, seed=3) != traffic.arrivals(5, 2.0, seed=4)
    assert traffic.arrivals(5, 2.0, seed=3)[0] == 0.0


@pytest.mark.parametrize("driver", ["poisson", "loadgen"])
@pytest.mark.parametrize("per_second", [5.0, 500.0])
def test_a_driver_takes_the_times_of_a_queue(driver: str, per_second: float) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen", reason="MLPerf LoadGen is not installed")
    served = traffic.DRIVERS[driver](answer, requests=5, per_second=per_second, seed=2)
    assert len(served) == 5
    assert served[0].due == 0.0
    free = 0.0
    for request in served:
        begin = max(request.due, free)
        # One after the other, none before it is due.
        assert request.first_token >= begin + PREFILL - 1e-3
        assert request.finished >= request.first_token + DECODE - 1e-3
        free = request.finished


@pytest.mark.parametrize("driver", ["poisson", "loadgen"])
@pytest.mark.parametrize("tokens_before", [0, 1])
def test_an_engine_that_fails_ends_a_driver_with_its_error(driver: str, tokens_before: int) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen", reason="MLPerf LoadGen is not installed")
    answered = 0

    def failing() -> Iterator[int]:
        nonlocal answered
        answered += 1
        yield from range(tokens_before if answered > 1 else 2)
        if answered > 1:
            raise ValueError("the second answer failed")

    with pytest.raises(ValueError, match="the second answer failed"):
        traffic.DRIVERS[driver](failing, requests=4, per_second=500.0, seed=2)


def test_loadgen_reports_the_times_that_its_own_summary_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlperf_loadgen", reason="MLPerf LoadGen is not installed")
    read = traffic.read_trace
    summaries = []

    def keep(path: Path) -> list[traffic.Request]:
        summaries.append((path.parent / "mlperf_log_summary.txt").read_text())
        return read(path)

    monkeypatch.setattr(traffic, "read_trace", keep)
    monkeypatch.chdir(tmp_path)
    served = traffic.loadgen(answer, requests=6, per_second=40.0, seed=1)
    figures = {
        name.strip(): value.strip()
        for name, _, value in (line.rpartition(":") for line in summaries[0].splitlines())
    }
    latencies = [request.finished - request.due for request in served]
    first = [request.first_token - request.due for request in served]
    assert float(figures["Max latency (ns)"]) == pytest.approx(max(latencies) * 1e9, rel=1e-6)
    assert float(figures["Min latency (ns)"]) == pytest.approx(min(latencies) * 1e9, rel=1e-6)
    assert float(figures["Mean First Token latency (ns)"]) == pytest.approx(
        np.mean(first) * 1e9, rel=1e-6
    )
    assert list(tmp_path.iterdir()) == []  # no log is left where the user happens to be
