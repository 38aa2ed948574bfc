"""The names of points in a picture."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.report.labels import Box, place

WITHIN = Box(0, 0, 400, 300)
RADIUS = 5.0

spots = st.tuples(st.floats(0, 400), st.floats(0, 300))


@pytest.mark.slow
@given(st.lists(st.tuples(spots, st.floats(20, 130)), max_size=25), st.lists(spots, max_size=3))
def test_no_name_overlaps_another_one_or_a_point(
    named: list[tuple[tuple[float, float], float]], others: list[tuple[float, float]]
) -> None:
    points = [spot for spot, _ in named]
    free = [Box(x, y - 1, x + 60, y + 1) for x, y in others]
    found = place(points, [(width, 13) for _, width in named], WITHIN, radius=RADIUS, free=free)
    for one, other in combinations(found, 2):
        assert not one.overlaps(other)
    for box, (_, width) in zip(found, named, strict=True):
        assert box.right - box.left == pytest.approx(width)
        assert box in WITHIN
        assert not any(box.overlaps(line) for line in free)
        assert not any(
            box.overlaps(Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)) for x, y in points
        )


def test_a_name_alone_stands_beside_its_point() -> None:
    (box,) = place([(100, 100)], [(50, 10)], WITHIN, radius=RADIUS)
    assert (box.left, box.top) == (107, 95)
    (box,) = place([(390, 100)], [(50, 10)], WITHIN, radius=RADIUS)
    assert box.right == 383


def test_names_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="no room for name 0 of 1"):
        place([(100, 100)], [(500, 10)], WITHIN, radius=RADIUS)
