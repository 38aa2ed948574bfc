"""What Triton's interpreter has to be told before it can stand in for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def mended() -> Iterator[None]:
    """Work round two errors of the interpreter, of Triton 3.6 and of 3.9."""
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _create_dot),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_lang_tensor),
    ):
        yield


_multiply: Any = interpreter.InterpreterBuilder.create_dot
_patch: Any = interpreter._patch_lang_tensor


def _create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """Triton 3.9 multiplies the bit patterns of bfloat16 as if they were integers."""
    return _multiply(self, _widened(a), _widened(b), *others)


def _widened(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes bounds of loops of arrays of one entry, which NumPy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
