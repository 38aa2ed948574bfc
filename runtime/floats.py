"""The floating-point types of logits and KV caches, and their conversion to float32."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from thanos_deploy.errors import InputError


@dataclass(frozen=True, slots=True)
class Float:
    """A floating-point type.

    Attributes:
        name: "float", "float16" or "bfloat16", as in ONNX Runtime and TensorRT.
        onnx: its number in ONNX's `TensorProto.DataType`.
        bits: the numpy type of its values; numpy has no bfloat16, whose bits are kept in uint16.
    """

    name: str
    onnx: int
    bits: DTypeLike

    @property
    def bytes(self) -> int:
        """Size of one value, in bytes."""
        return np.dtype(self.bits).itemsize

    def widen(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Convert values of this type to float32, which represents each of them exactly.

        Args:
            values: array of `bits`.
        """
        if self.name == "bfloat16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


FLOAT32 = Float("float", 1, np.float32)
FLOAT16 = Float("float16", 10, np.float16)
BFLOAT16 = Float("bfloat16", 16, np.uint16)

_KNOWN = {known.name: known for known in (FLOAT32, FLOAT16, BFLOAT16)}
_OTHER_NAMES = {"half": "float16", "bf16": "bfloat16"}  # TensorRT's


def named(name: str, *, tensor: str) -> Float:
    """Return the type of a name in ONNX Runtime ("tensor(float16)") or TensorRT ("HALF").

    Args:
        name: the name.
        tensor: name of the tensor that has this type, for the error message.

    Raises:
        InputError: the type is none of the three that are supported.
    """
    short = name.lower().removeprefix("tensor(").removesuffix(")")
    found = _KNOWN.get(_OTHER_NAMES.get(short, short))
    if found is None:
        raise InputError(
            f"{tensor} is of type {name}; the runtime reads {', '.join(_KNOWN)}",
            fix="export the model again with --dtype fp32 or fp16",
        )
    return found
