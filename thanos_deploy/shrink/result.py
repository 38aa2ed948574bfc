"""The result of cutting a block, as layers.json of a bundle records it.

Standard library only, so that a report needs no PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from thanos_deploy.bundle.codec import LATER
from thanos_deploy.model.block import Widths


@dataclass(frozen=True, slots=True)
class CutBlock:
    """One block after the cut.

    Attributes:
        before, after: widths of the block before and after the cut.
        heads: numbers, in the dense model, of the query heads that stayed.
        channels: numbers, in the dense model, of the feed-forward channels that stayed.
        heads_error, channels_error: relative error of the refitted layer that reads the heads or
            the channels: the energy of the difference from the target output, as a fraction of the
            target output's energy, on the calibration data.
        damping: the largest damping that was used.
        seconds: time by activity; see `layers.ACTIVITIES`.
        experts: numbers, in the dense model, of the experts that stayed; empty if none was removed.
            If any was, `channels_error` is instead the share of all experts' contribution to the
            hidden states that is lost with the removed ones; see `experts.dropped`.
        expert_channels: for each expert, numbers of the channels that stayed; empty if none was
            removed. If any was, `channels_error` is the largest error of an expert.
        unfitted: maps the name of each layer of an expert that was not refitted to the reason.
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
