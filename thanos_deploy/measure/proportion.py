"""Confidence intervals of the share of right answers, and of its change between two models."""

import math
from collections.abc import Sequence

from thanos_deploy.measure.run import Interval

# The quantile of the normal distribution that leaves 2.5 % on either side.
_Z = 1.959963984540054
_LEVEL = 0.95


def share(right: int, count: int) -> Interval:
    """A share of right answers with Wilson's score interval, which never leaves [0, 1].

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927.

    Args:
        right: number of questions that are answered right.
        count: number of all questions; at least 1.
    """
    p, z = right / count, _Z
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == count else middle + half
    return Interval(p, low, high, _LEVEL)


def change(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """The change of the share of right answers from one model to another, on the same questions.

    Only questions that exactly one of the models answers right carry information about the change,
    so this interval is narrower than the intervals of the two shares suggest. It is Wald's interval
    for matched pairs, with half an observation added to each of the four cells.

    Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005.

    Args:
        before: for each question, whether the first model's answer is right; at least one question.
        after: the same for the second model, in the same order.
    """
    pairs = list(zip(before, after, strict=True))
    lost, won = pairs.count((True, False)) + 0.5, pairs.count((False, True)) + 0.5
    count = len(pairs) + 2
    middle = (won - lost) / count
    half = _Z * math.sqrt(lost + won - (won - lost) ** 2 / count) / count
    exact = (won - lost) / len(pairs)
    return Interval(exact, max(-1.0, middle - half), min(1.0, middle + half), _LEVEL)
