"""What a part of the campaign is, and what it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setting:
    """What a part is given.

    Attributes:
        bundle: a small one, with the target onnx; not to be changed.
        folder: an empty one to work in.
        seconds: about how long it may take.
        seed: what is drawn at random depends on it alone.
    """

    bundle: Path
    folder: Path
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Figure:
    """One result.

    Attributes:
        name: what was counted or measured, with its unit.
        value: of it.
        wanted: what it is to be, in words; "" where it only says how much was done.
        holds: it is.
    """

    name: str
    value: float
    wanted: str = ""
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the campaign.

    Attributes:
        name: by which it is called.
        promise: what it tries to break, in a sentence.
        run: does it.
    """

    name: str
    promise: str
    run: Callable[[Setting], Sequence[Figure]]
