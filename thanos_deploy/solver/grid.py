"""Quantisation grids: bits, group size and symmetry. Importing this module needs no PyTorch."""

import re
from dataclasses import dataclass

from thanos_deploy.errors import UsageError

_SPELLING = re.compile(r"int(?P<bits>[48])(:(?P<group>[0-9]+|row))?(?P<asymmetric>:asym)?")
_ROW = "row"

# Group sizes that ONNX Runtime's MatMulNBits supports.
GROUPS = (16, 32, 64, 128, 256)
_GROUP = 32


@dataclass(frozen=True, slots=True)
class Grid:
    """Integer codes of a few bits, with one scale per group of neighbouring inputs of an output.

    A weight is scale * (code - zero). The zero point is itself a code, so 0 is always on the grid.
    Scales are numbers that bfloat16 and float16 both hold exactly, so that every format and every
    dtype of a model can store them.

    Attributes:
        bits: 4 or 8.
        group: number of inputs that share a scale; the last group of a row may be smaller. None if
            all inputs of an output share one, as engines that multiply int8 by int8 require.
        symmetric: the zero point is 0, and codes start at -2^(bits-1) (-127 for 8 bits). Otherwise
            each group has a zero point of its own, and codes start at 0.
    """

    bits: int
    group: int | None = _GROUP
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """The smallest code."""
        if not self.symmetric:
            return 0
        return -8 if self.bits == 4 else -127

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - int(self.symmetric))) - 1

    def width(self, cols: int) -> int:
        """Number of inputs that share a scale in a row of `cols` inputs."""
        return cols if self.group is None else self.group

    def groups(self, cols: int) -> int:
        """Number of groups in a row of `cols` inputs."""
        return -(-cols // self.width(cols))

    def __str__(self) -> str:
        """The spelling that `parse` reads."""
        return f"int{self.bits}:{self.group or _ROW}{'' if self.symmetric else ':asym'}"


def parse(spelling: str) -> Grid:
    """Parse a grid as written on the command line: int4, int8:row, int4:128, int4:32:asym.

    Raises:
        UsageError: the spelling is not that of a grid, or ONNX Runtime has no groups of that size.
    """
    found = _SPELLING.fullmatch(spelling)
    written = (found and found["group"]) or str(_GROUP)
    group = None if written == _ROW else int(written)
    if found is None or group not in (None, *GROUPS):
        raise UsageError(
            f"--quantize {spelling!r}",
            fix="use int8 or int4; then, optionally, the number of inputs that share a scale "
            f"(32 if left out), as in int4:128: one of {', '.join(map(str, GROUPS))} or "
            f"{_ROW} for all inputs; then, optionally, :asym for a zero point in each group",
        )
    return Grid(int(found["bits"]), group, not found["asymmetric"])
