"""The safetensors format, for files whose tensors are written one by one.

Source: the format's description: 8 bytes little-endian header length, a JSON header padded with
spaces to 8 bytes, then the tensors without gaps.
"""

import json
import math
import struct
from collections.abc import Iterable

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Of a checkpoint in several files: which tensor is in which.
INDEX = "model.safetensors.index.json"


def head(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """What stands before the tensors.

    Args:
        tensors: name, dtype (a key of `DTYPES`) and shape of each, in the order of the file.

    Returns:
        the bytes, and name -> where the tensor begins, in bytes from the start of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name, dtype, shape in tensors:
        begins[name] = offset
        offset += math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[name], offset]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = struct.pack("<Q", len(encoded)) + encoded
    return data, {name: len(data) + begin for name, begin in begins.items()}
