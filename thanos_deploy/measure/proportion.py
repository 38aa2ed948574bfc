"""Intervals of the share of questions that a model answers right, and of what it lost of it."""

import math
from collections.abc import Sequence

from thanos_deploy.measure.run import Interval

# The quantile of the normal distribution that leaves 2.5 % on either side.
_Z = 1.959963984540054
_LEVEL = 0.95


def share(right: int, count: int) -> Interval:
    """A share with the score interval of Wilson, which is in [0, 1] even where all are right.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927.

    Args:
        right: of the questions.
        count: of them; at least 1.
    """
    p, z = right / count, _Z
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == count else middle + half
    return Interval(p, low, high, _LEVEL)


def change(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """What a share changed by from one model to another, on the same questions.

    Only questions that one of them answers right and the other wrong say something of it, so this
    interval is narrower than those of the two shares suggest. It is Wald's for matched pairs, with
    half an observation added to each of the four cells.

    Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005.

    Args:
        before: whether each answer of the one is right; at least one.
        after: of the other, in the same order.
    """
    pairs = list(zip(before, after, strict=True))
    lost, won = pairs.count((True, False)) + 0.5, pairs.count((False, True)) + 0.5
    count = len(pairs) + 2
    middle = (won - lost) / count
    half = _Z * math.sqrt(lost + won - (won - lost) ** 2 / count) / count
    exact = (won - lost) / len(pairs)
    return Interval(exact, max(-1.0, middle - half), min(1.0, middle + half), _LEVEL)
