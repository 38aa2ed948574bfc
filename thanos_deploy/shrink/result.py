"""What became of the blocks that something was cut out of, as layers.json of a bundle has it.

Standard library only, so that a report needs no PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from thanos_deploy.bundle.codec import LATER
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
        experts: the experts that stayed, by their numbers in the dense model; empty where none
            went. `channels_error` is the share of what all experts add to the hidden states that
            went with the others then; see `experts.dropped`.
        expert_channels: of every expert the channels that stayed; empty where none went.
            `channels_error` is the largest of all experts then.
        unfitted: layers of experts that were not refitted -> why.
    """

    before: Widths
    after: Widths
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    heads_error: float
    channels_error: float
    damping: float
    seconds: Mapping[str, float]
    experts: tuple[int, ...] = field(default=(), metadata=LATER)
    expert_channels: tuple[tuple[int, ...], ...] = field(default=(), metadata=LATER)
    unfitted: Mapping[str, str] = field(default_factory=dict, metadata=LATER)
