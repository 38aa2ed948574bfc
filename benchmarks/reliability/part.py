"""The interface of a part of the campaign, and the form of its results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Setting:
    """The arguments of a part.

    Attributes:
        bundle: makes a small bundle with the target onnx, which must not be changed.
        folder: empty folder to work in.
        seconds: time limit, approximately.
        seed: random numbers depend only on this seed and on `done`.
        done: maps the names of the part's figures to their values so far; empty at first.
    """

    bundle: Callable[[], Path]
    folder: Path
    seconds: float
    seed: int
    done: Mapping[str, float] = field(default_factory=dict)

    def so_far(self, name: str) -> int:
        """Return the value of a figure so far; 0 if there is none."""
        return int(self.done.get(name, 0))


@dataclass(frozen=True, slots=True)
class Figure:
    """One counted or measured result.

    Attributes:
        name: what was counted or measured, with its unit.
        value: the value.
        least, most: required range of the value; None for no limit.
        joined: how the value is combined with that of an earlier slice: their sum, the larger one,
            or the later one.
    """

    name: str
    value: float
    least: float | None = None
    most: float | None = None
    joined: Literal["sum", "most", "last"] = "sum"

    @property
    def wanted(self) -> str:
        """The required range in words; empty if there is none."""
        words = []
        if self.least is not None:
            words.append(f"at least {self.least:g}")
        if self.most is not None:
            words.append(f"at most {self.most:g}" if self.most else "0")
        return " and ".join(words)

    @property
    def holds(self) -> bool:
        """Whether the value is in the required range."""
        return self.is_enough and (self.most is None or self.value <= self.most)

    @property
    def is_enough(self) -> bool:
        """Whether the value has reached the lower limit."""
        return self.least is None or self.value >= self.least

    def after(self, earlier: float) -> "Figure":
        """Return the figure combined with the value of an earlier slice."""
        match self.joined:
            case "sum":
                return replace(self, value=earlier + self.value)
            case "most":
                return replace(self, value=max(earlier, self.value))
            case "last":
                return self


@dataclass(frozen=True, slots=True)
class Slice:
    """Results of a part since its last slice.

    Attributes:
        figures: figures of this slice alone.
        faults: descriptions of what went wrong.
    """

    figures: Sequence[Figure]
    faults: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the campaign.

    Attributes:
        name: name of the part.
        promise: the promise that the part tries to break, in one sentence.
        run: runs the part, and yields its results until the time is over or all is done.
    """

    name: str
    promise: str
    run: Callable[[Setting], Iterator[Slice]]
