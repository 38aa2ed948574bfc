"""The floating-point types of logits and kv caches, and their conversion to float32."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from thanos_deploy.errors import InputError


@dataclass(frozen=True, slots=True)
class Float:
    """A floating-point type.

    Attributes:
        name: as ONNX Runtime and TensorRT call it: "float", "float16" or "bfloat16".
        onnx: its number in ONNX's `TensorProto.DataType`.
        bits: as numpy holds it; numpy has no bfloat16, whose bits are kept in uint16.
    """

    name: str
    onnx: int
    bits: DTypeLike

    @property
    def bytes(self) -> int:
        """Of one value."""
        return np.dtype(self.bits).itemsize

    def widen(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """Values of this type in float32, which holds each of them exactly.

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
    """A type by its name in ONNX Runtime ("tensor(float16)") or TensorRT ("HALF").

    Args:
        name: the name.
        tensor: what is of that type, for the error.

    Raises:
        InputError: it is none of the three.
    """
    short = name.lower().removeprefix("tensor(").removesuffix(")")
    found = _KNOWN.get(_OTHER_NAMES.get(short, short))
    if found is None:
        raise InputError(
            f"{tensor} is of type {name}; the runtime reads {', '.join(_KNOWN)}",
            fix="export the model again with --dtype fp32 or fp16",
        )
    return found
