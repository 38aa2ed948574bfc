"""Placement of the names of points in a chart, without overlaps with names or points.

The names are placed one after the other, each at the free place nearest to its point. There is no
random choice, so the same points always give the same places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Literal

Anchor = Literal["start", "middle", "end"]

# Steps between the places that are tried, in units of the chart.
_ACROSS, _DOWN = 4, 3

# Largest distance from the edge of a point to its name at which no line has to join them.
_BESIDE = 3.0


class NoRoomError(ValueError):
    """The chart is too small for all names."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether two boxes overlap; boxes that only touch do not."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def __contains__(self, other: "Box") -> bool:
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the place in the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def anchored(self, x: float) -> tuple[Anchor, float]:
        """Return which end of the name in the box is fixed, and the x of that end.

        It is the end nearer to the point at `x`. If the page shows the name in a narrower font than
        the one that measured the box, the gap is at the other end.
        """
        if x < self.left:
            return "start", self.left
        if x > self.right:
            return "end", self.right
        return "middle", (self.left + self.right) / 2

    def lead(self, x: float, y: float, radius: float) -> tuple[float, float] | None:
        """Return where a line from a point to its name ends; None if the name needs no line."""
        near = self.nearest(x, y)
        return near if hypot(near[0] - x, near[1] - y) > radius + _BESIDE else None


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    within: Box,
    *,
    radius: float,
    free: Sequence[Box] = (),
) -> list[Box]:
    """Return a box for the name of every point, in the order of the points.

    Args:
        points: x and y of each point.
        sizes: width and height of each name.
        within: the area that names must not leave.
        radius: half the side of the square around a point that names leave free.
        free: further areas that names leave free.

    Raises:
        NoRoomError: there is no room for a name.
    """
    taken = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken += free
    found: dict[int, Box] = {}
    # From right to left, because there are usually fewer points on the right; then from the top.
    for number in sorted(range(len(points)), key=lambda one: (-points[one][0], points[one][1])):
        for box in _places(*points[number], *sizes[number], within, radius):
            if not any(box.overlaps(other) for other in taken):
                break
        else:
            raise NoRoomError(f"there is no room for name {number} of {len(points)}")
        found[number] = box
        taken.append(box)
    return [found[number] for number in range(len(points))]


def _places(
    x: float, y: float, width: float, height: float, within: Box, radius: float
) -> Iterator[Box]:
    """Yield candidate boxes: right and left of the point, then all others, nearest first."""
    for left in (x + radius + 2, x - radius - 2 - width):
        box = Box(left, y - height / 2, left + width, y + height / 2)
        if box in within:
            yield box
    boxes = [
        Box(left, top, left + width, top + height)
        for left in _steps(within.left, within.right - width, _ACROSS)
        for top in _steps(within.top, within.bottom - height, _DOWN)
    ]

    def distance(box: Box) -> tuple[float, float, float]:
        near = box.nearest(x, y)
        return round(hypot(near[0] - x, near[1] - y), 3), box.top, box.left

    yield from sorted(boxes, key=distance)


def _steps(low: float, high: float, step: int) -> list[float]:
    return [low + step * number for number in range(int((high - low) / step) + 1)]
