"""Widths of one block before and after a cut.

Standard library only, so that records with widths can be read without PyTorch.
"""

from dataclasses import dataclass, field

from thanos_deploy.bundle.codec import LATER


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of one block.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads; divides `heads`.
        channels: feed-forward channels; in a block with experts, the channels of each expert.
        experts: number of experts; 0 for a dense feed-forward network.
    """

    heads: int
    kv_heads: int
    channels: int
    experts: int = field(default=0, metadata=LATER)

    @property
    def dropped(self) -> bool:
        """Whether the whole block was dropped; see `DROPPED`."""
        return self == DROPPED


# Widths of a block that was dropped as a whole.
DROPPED = Widths(heads=0, kv_heads=0, channels=0)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The planned widths of one block.

    Attributes:
        before, after: widths of the block.
        parameters_before, parameters_after: number of its parameters.
        predicted_loss: loss of cutting this block alone in the dense model; see `sizing.Losses`.
    """

    before: Widths
    after: Widths
    parameters_before: int
    parameters_after: int
    predicted_loss: float
