"""What Triton's interpreter has to be told before it can stand in for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def multiplying_bfloat16() -> Iterator[None]:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 as if they were integers."""
    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(self, widen(a), widen(b), *others)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = multiply
