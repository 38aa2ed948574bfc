"""What became of the blocks that something was cut out of, as layers.json of a bundle has it.

Standard library only, so that a report needs no PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from thanos_deploy.bundle.codec import Json, decode, encode
from thanos_deploy.model.block import Widths


@dataclass(frozen=True, slots=True)
class CutBlock:
    """One block as it was cut.

    Attributes:
        before, after: its widths.
        heads: the query heads that stayed, by their numbers in the dense model.
        channels: the feed-forward channels that stayed, the same.
        heads_error, channels_error: fraction of the energy of the output that the layer aims at,
            on the calibration data, that the refitted layer misses.
        damping: the most that was used.
        seconds: time by activity: "collect", "solve", "forward", "journal"; see
            `layers.ACTIVITIES`.
    """

    before: Widths
    after: Widths
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    heads_error: float
    channels_error: float
    damping: float
    seconds: Mapping[str, float]

    def to_json(self) -> Json:
        """For the journal."""
        return encode(self)

    @classmethod
    def from_json(cls, value: Json) -> "CutBlock":
        """What `to_json` made the value of."""
        return decode(cls, value)
