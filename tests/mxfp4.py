"""MXFP4 by its definition: a number of 4 bits for each weight, a power of two for each 32."""

import torch
from torch import Tensor

# What the eight numbers without a sign bit are (E2M1).
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def packed(name: str, whole: Tensor) -> dict[str, Tensor]:
    """Round a tensor of experts, [experts, inputs, outputs], to MXFP4, as the files have it."""
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
    """float64[experts, inputs, outputs] of what `packed` makes."""
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    signed = torch.where(codes < 8, 1.0, -1.0) * NUMBERS[codes % 8]
    powers = 2.0 ** (scales.double() - 127)
    return (signed * powers[..., None]).flatten(-2).transpose(1, 2)
