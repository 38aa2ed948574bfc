"""How wide one block of a model is, and was. Standard library only, so that records can be read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of one block.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads; divides `heads`.
        channels: feed-forward channels.
    """

    heads: int
    kv_heads: int
    channels: int


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
