"""The 0/1 knapsack problem: choose the items that are worth most and fit into a room together.

Items are considered one after another. Each selection so far is kept only if no other selection
dominates it, that is, is worth at least as much at the same or a smaller size. (Nemhauser and
Ullmann, "Discrete dynamic programming and capital allocation", Management Science 15, 1969.) If
many items share a few sizes, as the layers of equal blocks do, few selections remain and the result
is exact. If more than `MOST_WAYS` selections remain, the room is divided into that many parts, and
only the best selection of each part is kept. With n items, the result is then worth at least as
much as the best choice for 1 - n / `MOST_WAYS` of the room.
"""

from collections.abc import Sequence

import numpy as np

MOST_WAYS = 1 << 14


def best_that_fit(
    values: Sequence[float], sizes: Sequence[float], room: float, *, most_ways: int = MOST_WAYS
) -> tuple[int, ...]:
    """Return the numbers of the items that are worth most together and fit into the room.

    Args:
        values: value of each item, 0 or more.
        sizes: size of each item, 0 or more.
        room: largest total size of the chosen items.
        most_ways: largest number of selections that are kept after each item.

    Returns:
        the numbers of the chosen items, ascending.
    """
    size, value = np.zeros(1), np.zeros(1)
    # For each item and selection: the selection that it extends, and whether the item was taken.
    steps = []
    for one, worth in zip(sizes, values, strict=True):
        before = np.arange(len(size))
        fits = before[size + one <= room]
        grown_size = np.concatenate([size, size[fits] + one])
        grown_value = np.concatenate([value, value[fits] + worth])
        came_from = np.concatenate([before, fits])
        taken = np.arange(len(came_from)) >= len(before)
        # By ascending size, and of equal sizes the most valuable first.
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
