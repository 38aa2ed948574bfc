"""benchmarks.soak: what it finds, and a short run."""

import http.client
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak import Sample

QUIET = {"active_slots": 0.0, "queue": 0.0}
FINE = Counter({"200": 900, "400": 50, "503": 40, soak.LEFT: 10})


def samples(*, per_request: float) -> list[Sample]:
    """Memory that grows like this, and by much more while the server is warming up."""
    return [
        Sample(number, 10 * number, int(5e8 + 1e6 * min(number, 30) + per_request * 10 * number))
        for number in range(100)
    ]


def test_nothing_is_found_where_memory_rests_after_the_warm_up() -> None:
    assert soak.judge(FINE, QUIET, samples(per_request=0)) == []


def test_a_leak_is_found_and_measured() -> None:
    leaking = samples(per_request=50_000)
    assert soak.growth(leaking) == pytest.approx(50_000)
    (found,) = soak.judge(FINE, QUIET, leaking)
    assert found == ("memory grew by 50000 bytes a request (limit 1024), in all by 6.0% (limit 2%)")


def test_what_an_allocator_takes_at_once_is_no_leak() -> None:
    stepping = [
        Sample(number, 10 * number, 500_000_000 + 5_000_000 * (number > 60))
        for number in range(100)
    ]
    assert soak.growth(stepping) > soak.MOST_GROWTH
    assert soak.judge(FINE, QUIET, stepping) == []


@pytest.mark.parametrize("how", ["500", "502", soak.BROKEN, soak.IN_STREAM, soak.NO_RETRY_AFTER])
def test_a_request_that_should_not_end_so_is_found(how: str) -> None:
    outcomes = FINE + Counter({how: 2})
    assert soak.judge(outcomes, QUIET, samples(per_request=0)) == [f"{how}: 2 requests"]


def test_a_stuck_slot_is_found() -> None:
    left = {**QUIET, "active_slots": 1.0}
    assert soak.judge(FINE, left, samples(per_request=0)) == ["active_slots: 1 in the end"]


def test_a_503_has_to_say_when_to_retry() -> None:
    headers = http.client.HTTPMessage()
    assert soak.outcome(503, headers) == soak.NO_RETRY_AFTER
    headers["Retry-After"] = "1"
    assert soak.outcome(503, headers) == "503"


@pytest.mark.slow
def test_everything_at_once_leaves_nothing_behind(exported_llama: Path) -> None:
    result = soak.soak(exported_llama, seconds=4, seed=0)
    assert set(result["outcomes"]) <= {kind.__name__ for kind in soak.WEIGHTS}
    assert result["outcomes"]["completion"]["200"] > 0
    assert result["left"] == QUIET
    # Four seconds are warm-up: of memory they say nothing.
    assert [reason for reason in result["reasons"] if not reason.startswith("memory")] == []
    assert soak.shown(result).startswith(f"{result['requests']} requests in 4 s")
