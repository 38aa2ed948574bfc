"""What a walk holds at once, in memory and on disk, from shapes alone."""

import torch
from torch import Tensor

from thanos_deploy.calibration import passes
from thanos_deploy.model.checkpoint import Checkpoint

# What forward passes may hold that wait inside a block until a layer is pruned. Where it would be
# more, each starts over from the block's input, which takes longer and holds one batch at a time.
WAITING_BYTES = 768 << 20


def activation_bytes(
    checkpoint: Checkpoint, tokens: int, forward: torch.dtype, *, with_dense: bool
) -> int:
    """Bytes of disk for a walk's activations: those that entered, enter and leave a block."""
    width, ways = checkpoint.config.hidden_size, 1 + with_dense
    return 3 * ways * tokens * int(width) * activation_dtype(checkpoint, forward).itemsize


def activation_dtype(checkpoint: Checkpoint, forward: torch.dtype) -> torch.dtype:
    """That in which blocks run, or that of the weights if it is smaller."""
    weights = checkpoint.weights.dtypes[checkpoint.stored_name(f"{checkpoint.linears[0]}.weight")]
    return min(forward, weights, key=lambda dtype: dtype.itemsize)


def can_wait(checkpoint: Checkpoint, segments: Tensor, ways: int, forward: torch.dtype) -> bool:
    """Passes can wait inside a block; for the arguments see `waiting_bytes`."""
    return passes.can_wait() and waiting_bytes(checkpoint, segments, ways, forward) <= WAITING_BYTES


def waiting_bytes(checkpoint: Checkpoint, segments: Tensor, ways: int, forward: torch.dtype) -> int:
    """What passes hold that wait in a block: stream, norm, queries to values, and a layer's input.

    An estimate, from the shapes: what a pass holds where it holds most, at the layer that reads the
    feed-forward channels.

    Args:
        checkpoint: the model.
        segments: int64[count, length], what passes.
        ways: 2 if it passes the dense model as well, else 1.
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
