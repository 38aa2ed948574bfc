"""Statistics of two models that took turns: percentiles, ratios, confidence intervals, drift.

Samples of one round are not independent: they share the moment, the caches and the clock. So the
bootstrap resamples whole rounds, and keeps both models' samples of a round together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from thanos_deploy.measure.run import Interval

LEVEL = 0.95

_RESAMPLES = 2000

# Samples have drifted if their median has moved by more than the first fraction, and the p-value of
# the trend over the rounds is below the second.
MOST_DRIFT = 0.05
_CHANCE = 0.01


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, 90th and 99th percentile of some samples, in the unit of the samples."""

    count: int
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Drift:
    """The trend of samples over the rounds.

    Attributes:
        change: relative change of the median from the first third of the rounds to the last third.
        p_value: p-value of Spearman's rank correlation between the rounds and their medians.
    """

    change: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether the change is too large to be ignored and the trend is significant."""
        return abs(self.change) > MOST_DRIFT and self.p_value < _CHANCE


def summarise(samples: Sequence[float]) -> Summary:
    """Compute the median, the 90th and the 99th percentile."""
    median, p90, p99 = np.percentile(samples, [50, 90, 99])
    return Summary(len(samples), float(median), float(p90), float(p99))


def ratio(
    subject: Sequence[float], baseline: Sequence[float], *, rounds: int, level: float = LEVEL
) -> Interval:
    """The subject's median divided by the baseline's, with a bootstrap confidence interval.

    It is the percentile interval. The acceleration of BCa comes from the jackknife, which leaves
    out one round at a time and gives nothing useful for a median (Efron, "The Jackknife, the
    Bootstrap and Other Resampling Plans", 1982, section 3.4).

    Args:
        subject: samples of the subject in the order of the rounds, equally many in each round.
        baseline: samples of the baseline, likewise.
        rounds: number of rounds; at least 2.
        level: confidence level of the interval.
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
    """The trend of samples over the rounds; None if there are fewer than 6 rounds.

    Args:
        samples: samples in the order of the rounds, equally many in each round.
        rounds: number of rounds.
    """
    third = rounds // 3
    if third < 2:
        return None
    of_rounds = np.median(np.reshape(samples, (rounds, -1)), axis=1)
    change = float(np.median(of_rounds[-third:]) / np.median(of_rounds[:third])) - 1
    if np.ptp(of_rounds) == 0:
        return Drift(change, 1.0)
    return Drift(change, float(stats.spearmanr(np.arange(rounds), of_rounds).pvalue))
