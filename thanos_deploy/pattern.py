"""Sparsity patterns: three kinds, each with one spelling.

    unstructured:0.5    the given fraction of all weights is removed, anywhere
    2:4                 2 of every 4 consecutive weights along the input dimension are kept
    structured:0.3      the given fraction of whole input columns is removed

`n:m` keeps n of m weights, which is NVIDIA's meaning. In the research code of SparseGPT, Wanda and
Thanos, n counts the weights removed. Both meanings agree for 2:4 and 4:8 and differ for 1:4, so the
fields are called `kept` and `group` and never `n` and `m`.
"""

import re
from dataclasses import dataclass

from thanos_deploy.errors import PatternError

SPELLINGS = "n:m such as 2:4 or 4:8, unstructured:FRACTION, structured:FRACTION"


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Remove a fraction of the weights, wherever they are.

    Raises:
        PatternError: the fraction is outside [0, 1].
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise _fraction_error("unstructured", self.sparsity)

    def __str__(self) -> str:
        return f"unstructured:{self.sparsity!r}"


@dataclass(frozen=True, slots=True)
class SemiStructured:
    """Keep `kept` of every `group` consecutive weights along the input dimension.

    Raises:
        PatternError: 0 < kept < group does not hold.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group:
            raise PatternError(
                f"pattern {self.kept}:{self.group} keeps {self.kept} of every {self.group} weights",
                fix="keep at least one and fewer than all, such as 2:4",
            )

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is removed."""
        return 1.0 - self.kept / self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True, slots=True)
class Structured:
    """Remove a fraction of whole input columns.

    Raises:
        PatternError: the fraction is outside [0, 1].
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise _fraction_error("structured", self.sparsity)

    def __str__(self) -> str:
        return f"structured:{self.sparsity!r}"


Pattern = Unstructured | SemiStructured | Structured


def parse(text: str) -> Pattern:
    """Read a pattern; the inverse of `str`.

    Raises:
        PatternError: the spelling is unknown or the numbers are out of range.
    """
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        return SemiStructured(int(match[1]), int(match[2]))
    name, _, number = text.partition(":")
    try:
        match name:
            case "unstructured":
                return Unstructured(float(number))
            case "structured":
                return Structured(float(number))
    except ValueError:
        pass  # not a number: the message below shows the whole spelling
    raise PatternError(f"pattern {text!r} is not understood", fix=f"write {SPELLINGS}")


def _fraction_error(kind: str, value: float) -> PatternError:
    return PatternError(
        f"pattern {kind}:{value!r}: the fraction is not between 0 and 1",
        fix=f"write {kind}:0.5 for one half",
    )
