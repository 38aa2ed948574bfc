"""The most valuable things that fit, by every subset."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.pruning.knapsack import best_that_fit

THINGS = st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 20)), max_size=9)


def most(things: list[tuple[float, int]], room: float) -> float:
    return max(
        sum(value for value, _ in some)
        for count in range(len(things) + 1)
        for some in combinations(things, count)
        if sum(size for _, size in some) <= room
    )


@given(things=THINGS, room=st.floats(0.0, 100.0))
def test_nothing_that_fits_is_worth_more(things: list[tuple[float, int]], room: float) -> None:
    values, sizes = [value for value, _ in things], [size for _, size in things]
    taken = best_that_fit(values, sizes, room)
    assert list(taken) == sorted(set(taken))
    assert sum(sizes[number] for number in taken) <= room
    assert abs(sum(values[number] for number in taken) - most(things, room)) < 1e-9


@given(things=THINGS, room=st.floats(1.0, 100.0), most_ways=st.integers(12, 40))
def test_with_few_ways_it_is_worth_what_fits_into_a_little_less(
    things: list[tuple[float, int]], room: float, most_ways: int
) -> None:
    values, sizes = [value for value, _ in things], [size for _, size in things]
    taken = best_that_fit(values, sizes, room, most_ways=most_ways)
    assert sum(sizes[number] for number in taken) <= room
    less = room * (1.0 - len(things) / most_ways)
    assert sum(values[number] for number in taken) >= most(things, less) - 1e-9


def test_many_things_of_all_sizes_are_weighed_up() -> None:
    """As many as a model of 80 blocks has, with no two of one size."""
    sizes = [1.0 + 0.37 * (number * 7919 % 320) / 320 for number in range(320)]
    values = [1.0 + (number * 104729 % 331) / 331 for number in range(320)]
    taken = best_that_fit(values, sizes, 80.0)
    assert sum(sizes[number] for number in taken) <= 80.0
    # By relaxation: whole things by value for size, and a fraction of the last one.
    room, bound = 80.0, 0.0
    for value, size in sorted(
        zip(values, sizes, strict=True), key=lambda one: one[0] / one[1], reverse=True
    ):
        bound += value * min(1.0, room / size)
        room = max(0.0, room - size)
    assert 0.99 * bound <= sum(values[number] for number in taken) <= bound
