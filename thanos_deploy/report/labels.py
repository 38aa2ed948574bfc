"""Where the names of points go, so that none overlaps another one or a point.

One after the other, each gets the place nearest to its point that is still free. Nothing is drawn
by chance, so that the same points get the same places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Literal

Anchor = Literal["start", "middle", "end"]

# Steps between the places that are tried, in units of the picture.
_ACROSS, _DOWN = 4, 3

# The distance between a point and a name that needs no line to it.
_BESIDE = 3.0


class NoRoomError(ValueError):
    """A picture is too small for all names."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """They have more than an edge in common."""
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
        """The place in it that is nearest to another one."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def anchored(self, x: float) -> tuple[Anchor, float]:
        """Which end of the name in it is fixed, and where: the one that is nearer to its point.

        A font that is narrower than the one that was measured then leaves room at the other end.
        """
        if x < self.left:
            return "start", self.left
        if x > self.right:
            return "end", self.right
        return "middle", (self.left + self.right) / 2

    def lead(self, x: float, y: float, radius: float) -> tuple[float, float] | None:
        """Where a line from a point to its name ends; None for a name that is beside its point."""
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
    """A box for the name of every point.

    Args:
        points: x and y.
        sizes: width and height of each name.
        within: what names must not leave.
        radius: of a point.
        free: what is to be left free beside the points.

    Raises:
        NoRoomError: there is no room for a name.
    """
    taken = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken += free
    found: dict[int, Box] = {}
    # From the right, where the crowd usually is not, and from above.
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
    """Boxes of a size, nearest to a point first: to its right and left, then all others."""
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
