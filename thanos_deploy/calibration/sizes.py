"""Memory and disk space that a walk needs, computed from shapes alone."""

import torch
from torch import Tensor

from thanos_deploy.calibration import passes
from thanos_deploy.model.checkpoint import Checkpoint

# Bytes that forward passes may hold while they wait inside a block for a layer to be pruned. If
# they would hold more, each pass starts over from the block's input instead, which takes longer and
# holds one batch at a time.
WAITING_BYTES = 768 << 20


def activation_bytes(
    checkpoint: Checkpoint, tokens: int, forward: torch.dtype, *, with_dense: bool
) -> int:
    """Bytes of disk for a walk's hidden states.

    Three sets of files exist at once: the inputs of the previous block, the inputs of the current
    block, and its outputs.

    Args:
        checkpoint: the model.
        tokens: number of calibration tokens.
        forward: the dtype in which blocks run.
        with_dense: whether the data passes the dense model as well.
    """
    width, ways = checkpoint.config.hidden_size, 1 + with_dense
    return 3 * ways * tokens * int(width) * activation_dtype(checkpoint, forward).itemsize


def activation_dtype(checkpoint: Checkpoint, forward: torch.dtype) -> torch.dtype:
    """The dtype of stored hidden states: that in which blocks run, or the weights' if smaller."""
    weights = checkpoint.weights.dtypes[checkpoint.stored_name(f"{checkpoint.linears[0]}.weight")]
    return min(forward, weights, key=lambda dtype: dtype.itemsize)


def can_wait(checkpoint: Checkpoint, segments: Tensor, ways: int, forward: torch.dtype) -> bool:
    """Whether passes can wait inside a block; for the arguments see `waiting_bytes`."""
    return passes.can_wait() and waiting_bytes(checkpoint, segments, ways, forward) <= WAITING_BYTES


def waiting_bytes(checkpoint: Checkpoint, segments: Tensor, ways: int, forward: torch.dtype) -> int:
    """Estimate the bytes that waiting passes hold, from the shapes.

    A pass holds most at the layer that reads the feed-forward channels. For each token this counts
    the widest input or output of any linear layer, and twice the hidden size.

    Args:
        checkpoint: the model.
        segments: int64[count, length], the calibration tokens.
        ways: 2 if the data passes the dense model as well, else 1.
        forward: the dtype in which blocks run.
    """
    widest = max(
        max(checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight")])
        for name in checkpoint.linears
    )
    return (
        forward.itemsize
        * ways
        * segments.numel()
        * (widest + 2 * int(checkpoint.config.hidden_size))
    )
