"""How wide one block of a model is, and was. Standard library only, so that records can be read."""

from dataclasses import dataclass, field

from thanos_deploy.bundle.codec import LATER


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of one block.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads; divides `heads`.
        channels: feed-forward channels; of each expert, where there are any.
        experts: how many there are; 0 for a dense feed-forward network.
    """

    heads: int
    kv_heads: int
    channels: int
    experts: int = field(default=0, metadata=LATER)

    @property
    def dropped(self) -> bool:
        """The block is gone; see `DROPPED`."""
        return self == DROPPED


# What a block has that was dropped as a whole.
DROPPED = Widths(heads=0, kv_heads=0, channels=0)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The planned widths of one block.

    Attributes:
        before, after: its widths.
        parameters_before, parameters_after: all of its parameters.
        predicted_loss: see `sizing.Losses`; of the block alone, in the dense model.
    """

    before: Widths
    after: Widths
    parameters_before: int
    parameters_after: int
    predicted_loss: float
