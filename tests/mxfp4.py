"""MXFP4 by its definition: a 4-bit number for each weight, and a power of two for each 32 weights.

This is the reference for tests of `thanos_deploy.model.mxfp4`.
"""

import torch
from torch import Tensor

# The values of the eight E2M1 codes whose sign bit is 0.
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def packed(name: str, whole: Tensor) -> dict[str, Tensor]:
    """Round the weights of experts to MXFP4, in the layout of published checkpoints.

    Args:
        name: name of the weight in the checkpoint.
        whole: [experts, inputs, outputs]; the number of inputs is a multiple of 32.

    Returns:
        "`name`_blocks": uint8[experts, outputs, inputs / 32, 16], two codes in each byte, and
        "`name`_scales": uint8[experts, outputs, inputs / 32], exponents of 2 plus 127.
    """
    blocks = whole.double().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1) / 6.0).clamp(min=1e-30).log2().ceil()
    scaled = blocks / 2.0 ** exponent[..., None]
    codes = (scaled.abs()[..., None] - NUMBERS).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes[..., ::2], codes[..., 1::2]
    return {
        f"{name}_blocks": (low + 16 * high).to(torch.uint8),
        f"{name}_scales": (exponent + 127).to(torch.uint8),
    }


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """Restore the weights, float64[experts, inputs, outputs], from the two tensors of `packed`."""
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    signed = torch.where(codes < 8, 1.0, -1.0) * NUMBERS[codes % 8]
    powers = 2.0 ** (scales.double() - 127)
    return (signed * powers[..., None]).flatten(-2).transpose(1, 2)
