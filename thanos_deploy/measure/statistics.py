"""Statistics of two series of samples that took turns: percentiles, ratios, intervals, drift.

Samples of one round are not independent (they share the moment, the caches, the clock), so what is
resampled is rounds, and a round's samples of both things stay together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from thanos_deploy.measure.run import Interval

LEVEL = 0.95

_RESAMPLES = 2000

# Samples have drifted if their median moved by more than this fraction, and so steadily that chance
# would do it in fewer runs than this.
MOST_DRIFT = 0.05
_CHANCE = 0.01


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and tail of a set of samples, in their unit."""

    count: int
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How samples moved while they were taken.

    Attributes:
        change: of the median, from the first third of the rounds to the last, as a fraction.
        p_value: how likely so clear an order of the rounds is where nothing moves.
    """

    change: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """It is too large to be left out of account, and no chance."""
        return abs(self.change) > MOST_DRIFT and self.p_value < _CHANCE


def summarise(samples: Sequence[float]) -> Summary:
    """Median, 90th and 99th percentile."""
    median, p90, p99 = np.percentile(samples, [50, 90, 99])
    return Summary(len(samples), float(median), float(p90), float(p99))


def ratio(
    subject: Sequence[float], baseline: Sequence[float], *, rounds: int, level: float = LEVEL
) -> Interval:
    """Median of the subject over median of the baseline, with a bootstrap interval.

    The percentile interval is taken: the corrections of BCa come from leaving one round out at a
    time, which says nothing useful about a median (Efron, "The Jackknife, the Bootstrap and Other
    Resampling Plans", 1982, section 3.4).

    Args:
        subject: its samples, as many in each round, in the order of the rounds.
        baseline: likewise.
        rounds: how many rounds the samples are from; at least 2.
        level: of the interval.
    """
    of_subject, of_baseline = (np.reshape(samples, (rounds, -1)) for samples in (subject, baseline))

    def statistic(chosen: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        shape = (*chosen.shape[:-1], -1)
        above, below = (
            np.median(samples[chosen].reshape(shape), axis=-1)
            for samples in (of_subject, of_baseline)
        )
        quotient: NDArray[np.float64] = above / below
        return quotient

    numbers = np.arange(rounds)
    found = stats.bootstrap(
        (numbers,),
        statistic,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(statistic(numbers)), float(found.low), float(found.high), level)


def drift(samples: Sequence[float], *, rounds: int) -> Drift | None:
    """How samples moved from round to round; None where there are fewer than 6 rounds.

    Args:
        samples: as many in each round, in the order of the rounds.
        rounds: how many.
    """
    third = rounds // 3
    if third < 2:
        return None
    of_rounds = np.median(np.reshape(samples, (rounds, -1)), axis=1)
    change = float(np.median(of_rounds[-third:]) / np.median(of_rounds[:third])) - 1
    if np.ptp(of_rounds) == 0:
        return Drift(change, 1.0)
    return Drift(change, float(stats.spearmanr(np.arange(rounds), of_rounds).pvalue))
