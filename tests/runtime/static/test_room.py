import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.static.room import Room


def test_a_step_reaches_sizes_that_are_at_most_a_third_empty() -> None:
    reached = sorted({Room(1, 4096).reach(length) for length in range(1, 4097)})
    assert reached == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_step_reaches_all_that_is_there_and_nothing_outside_its_room(
    tokens: int, length: int
) -> None:
    reach = Room(1, tokens).reach(min(length, tokens))
    assert min(length, tokens) <= reach <= tokens


@pytest.mark.parametrize(
    ("needed", "grown"),
    [
        (Room(1, 101), Room(2, 200)),
        (Room(3, 50), Room(3, 100)),
        (Room(4, 900), Room(4, 900)),
        (Room(1, 600), Room(2, 600)),
    ],
)
def test_a_room_grows_to_what_is_needed_and_by_no_less_than_twice_the_tokens(
    needed: Room, grown: Room
) -> None:
    assert Room(2, 100).grown(needed, most_tokens=1000) == grown
    assert grown.holds(needed)


def test_a_room_never_grows_beyond_what_the_model_takes() -> None:
    assert Room(1, 600).grown(Room(1, 601), most_tokens=1000) == Room(1, 1000)
