"""What a part of the campaign is, and what it finds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Setting:
    """What a part is given.

    Attributes:
        bundle: makes a small one, with the target onnx; not to be changed.
        folder: an empty one to work in.
        seconds: about how long it may take.
        seed: what is drawn at random depends on it and on `done` alone.
        done: the values of the part's figures so far, by name; empty at first.
    """

    bundle: Callable[[], Path]
    folder: Path
    seconds: float
    seed: int
    done: Mapping[str, float] = field(default_factory=dict)

    def so_far(self, name: str) -> int:
        """How often something was done."""
        return int(self.done.get(name, 0))


@dataclass(frozen=True, slots=True)
class Figure:
    """One result.

    Attributes:
        name: what was counted or measured, with its unit.
        value: of it.
        least, most: what it is to be; None where it only says how much was done.
        joined: what becomes of it and that of an earlier slice.
    """

    name: str
    value: float
    least: float | None = None
    most: float | None = None
    joined: Literal["sum", "most", "last"] = "sum"

    @property
    def wanted(self) -> str:
        """What it is to be, in words."""
        words = []
        if self.least is not None:
            words.append(f"at least {self.least:g}")
        if self.most is not None:
            words.append(f"at most {self.most:g}" if self.most else "0")
        return " and ".join(words)

    @property
    def holds(self) -> bool:
        """It is."""
        return self.is_enough and (self.most is None or self.value <= self.most)

    @property
    def is_enough(self) -> bool:
        """As much was done as is to be."""
        return self.least is None or self.value >= self.least

    def after(self, earlier: float) -> "Figure":
        """Together with the value of an earlier slice."""
        match self.joined:
            case "sum":
                return replace(self, value=earlier + self.value)
            case "most":
                return replace(self, value=max(earlier, self.value))
            case "last":
                return self


@dataclass(frozen=True, slots=True)
class Slice:
    """What a part has found since it last said so.

    Attributes:
        figures: of this slice alone.
        faults: what was wrong, in words.
    """

    figures: Sequence[Figure]
    faults: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the campaign.

    Attributes:
        name: by which it is called.
        promise: what it tries to break, in a sentence.
        run: does some of it; ends when its time is over or all is done.
    """

    name: str
    promise: str
    run: Callable[[Setting], Iterator[Slice]]
