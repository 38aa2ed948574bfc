"""The 0/1 knapsack: of several things, those worth most that fit together.

Things are taken or left one after the other. Of all ways so far only those are kept that no other
one beats, being worth at least as much at the same or a smaller size. (Nemhauser and Ullmann,
"Discrete dynamic programming and capital allocation", Management Science 15, 1969.) Where many
things have one of few sizes, as the layers of equal blocks do, few ways are left and the result is
exact. Where there are more than `MOST_WAYS`, the room is divided into so many parts, and only the
best way of each part is kept. With n things the result is then worth at least what fits best into
1 - n / `MOST_WAYS` of the room.
"""

from collections.abc import Sequence

import numpy as np

MOST_WAYS = 1 << 14


def best_that_fit(
    values: Sequence[float], sizes: Sequence[float], room: float, *, most_ways: int = MOST_WAYS
) -> tuple[int, ...]:
    """The numbers of the things that are worth most together and fit into some room.

    Args:
        values: what each thing is worth, 0 or more.
        sizes: what room each takes, 0 or more.
        room: that all of them may take.
        most_ways: how many ways are kept after each thing.

    Returns:
        rising numbers.
    """
    size, value = np.zeros(1), np.zeros(1)
    # Of each thing and way: which way it was made from, and whether the thing was taken.
    steps = []
    for one, worth in zip(sizes, values, strict=True):
        before = np.arange(len(size))
        fits = before[size + one <= room]
        grown_size = np.concatenate([size, size[fits] + one])
        grown_value = np.concatenate([value, value[fits] + worth])
        came_from = np.concatenate([before, fits])
        taken = np.arange(len(came_from)) >= len(before)
        # From small to large, and of one size the most valuable first.
        order = np.lexsort((-grown_value, grown_size))
        best_before = np.maximum.accumulate(np.concatenate([[-np.inf], grown_value[order][:-1]]))
        order = order[grown_value[order] > best_before]
        if len(order) > most_ways:
            part = np.floor(grown_size[order] * (most_ways / room))
            order = order[np.append(part[1:] != part[:-1], True)]
        size, value = grown_size[order], grown_value[order]
        steps.append((came_from[order], taken[order]))
    way, chosen = len(value) - 1, []
    for number in range(len(steps) - 1, -1, -1):
        came, took = steps[number]
        if took[way]:
            chosen.append(number)
        way = came[way]
    return tuple(reversed(chosen))
