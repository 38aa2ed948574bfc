"""Pack codes of 4 or 8 bits into bytes; of two 4-bit codes, the first is in the lower half."""

import numpy as np
from numpy.typing import NDArray


def pack(codes: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    """Pack codes into uint8[rows, cols * bits / 8, rounded up].

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
    """Unpack to int16[rows, cols]; a column that `pack` added to an odd number is not removed."""
    values = packed.astype(np.int16)
    if bits == 8:
        return values
    pairs = np.stack([values & 15, values >> 4], axis=2)
    return pairs.reshape(len(values), -1)
