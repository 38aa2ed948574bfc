"""Codes of 4 or 8 bits in bytes, as every format here has them: the first in the lower half."""

import numpy as np
from numpy.typing import NDArray


def pack(codes: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    """uint8[rows, cols * bits / 8, rounded up].

    Args:
        codes: [rows, cols], from 0 to 2^bits - 1.
        bits: 4 or 8.
    """
    values = codes.astype(np.uint8)
    if bits == 8:
        return values
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    joined: NDArray[np.uint8] = np.bitwise_or(even[:, ::2], even[:, 1::2] * np.uint8(16))
    return joined


def unpack(packed: NDArray[np.generic], bits: int) -> NDArray[np.int16]:
    """int16[rows, cols], the reverse of `pack`; with one more column where that was added."""
    values = packed.astype(np.int16)
    if bits == 8:
        return values
    pairs = np.stack([values & 15, values >> 4], axis=2)
    return pairs.reshape(len(values), -1)
