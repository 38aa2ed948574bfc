import numpy as np
import pytest

from thanos_deploy.measure.statistics import drift, ratio, summarise


def test_a_summary_is_the_median_and_the_tail() -> None:
    summary = summarise([float(i) for i in range(1, 102)])
    assert (summary.count, summary.median, summary.p90, summary.p99) == (101, 51.0, 91.0, 100.0)


def test_rounds_stay_together() -> None:
    """Every round is slower than the one before, for both alike, and the ratio does not notice."""
    dense = [factor * seconds for factor in (1.0, 2.0, 4.0, 8.0, 16.0) for seconds in (2.0, 2.2)]
    found = ratio([seconds / 2 for seconds in dense], dense, rounds=5)
    assert (found.low, found.estimate, found.high) == pytest.approx((0.5, 0.5, 0.5))


def same_machine(seed: int, rounds: int, samples: int) -> list[list[float]]:
    """Times of one model, twice: a wandering clock, noise of every turn, and a tail."""
    random = np.random.default_rng(seed)
    clock = np.cumsum(random.normal(0, 0.01, (rounds, 1)), axis=0)
    return [
        np.exp(
            clock
            + random.normal(0, 0.04, (rounds, 1))
            + np.abs(random.normal(0, 0.05, (rounds, samples)))
        )
        .ravel()
        .tolist()
        for _ in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 16])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(samples: int) -> None:
    hits = sum(
        1.0 in ratio(first, second, rounds=10)
        for first, second in (same_machine(seed, 10, samples) for seed in range(100))
    )
    assert hits >= 88  # 95 are expected; 88 is three standard deviations below


def test_a_difference_is_found_and_a_wider_interval_is_wider() -> None:
    slow, fast = same_machine(0, 12, 4)
    faster = [0.7 * seconds for seconds in fast]
    found = ratio(faster, slow, rounds=12)
    assert 0.7 * 0.9 < found.estimate < 0.7 * 1.1
    assert 1.0 not in found
    wider = ratio(faster, slow, rounds=12, level=0.999)
    assert wider.low < found.low < found.high < wider.high


def test_samples_of_one_round_count_as_one_observation() -> None:
    """A hundred samples of each of six rounds that differ: the interval is that of six rounds."""
    random = np.random.default_rng(0)
    of_round = np.exp(random.normal(0, 0.1, 6)).tolist()
    few = ratio(of_round, [1.0] * 6, rounds=6)
    many = ratio([seconds for seconds in of_round for _ in range(100)], [1.0] * 600, rounds=6)
    assert many.high - many.low > 0.7 * (few.high - few.low)


def test_drift_is_a_steady_change() -> None:
    steady = drift([float(number) for number in range(10, 22)], rounds=12)
    assert steady is not None
    assert steady.change == pytest.approx(19.5 / 11.5 - 1)
    assert steady.p_value < 0.01
    still = drift([1.0] * 12, rounds=12)
    assert still is not None
    assert (still.change, still.p_value) == (0.0, 1.0)
    noise = np.random.default_rng(0).normal(1, 0.05, 12)
    moved = drift(list(noise), rounds=12)
    assert moved is not None
    assert moved.p_value > 0.05
    assert drift([1.0] * 5, rounds=5) is None
