"""Rewrites of a traced graph to fewer nodes, or to forms that runtimes fuse when they load it.

Only standard ONNX operators go in and out, so every runtime still takes the graph. Each rewrite is
two functions: the pattern that is looked for, and its replacement.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.rewriter import RewritePass, RewriteRule
from onnxscript.rewriter.rules.common import collapse_slice_rule


def _times_reciprocal(op: Any, x: Any, square: Any) -> Any:
    return op.Mul(x, op.Reciprocal(op.Sqrt(square)))


def _divided(op: Any, x: Any, square: Any) -> Any:
    """An RMS norm in the form that ONNX Runtime fuses.

    before: Mul(x, Reciprocal(Sqrt(mean square)))
    after:  Div(x, Sqrt(mean square))
    """
    return op.Div(x, op.Sqrt(square))


def _with_repeated_keys(
    op: Any, queries: Any, keys: Any, axis: Any, repeated: Any, flat: Any
) -> Any:
    copies = op.Reshape(op.Expand(op.Unsqueeze(keys, axis), repeated), flat)
    return op.MatMul(queries, op.Transpose(copies, perm=[0, 1, 3, 2]))


def _with_keys(op: Any, queries: ir.Value, keys: ir.Value, **_: Any) -> Any:
    """Multiply all queries that share a key head with it at once, without copies of the keys.

    before: keys [b, kv heads, t, d] -> Unsqueeze -> Expand -> Reshape [b, heads, t, d] -> Transpose
            -> MatMul with queries [b, heads, s, d]
    after:  queries -> Reshape [b, kv heads, group * s, d] -> MatMul with Transpose(keys)
            -> Reshape [b, heads, s, t]
    """
    stacked = _with_heads(op, queries, _heads(keys))
    scores = op.MatMul(stacked, op.Transpose(keys, perm=[0, 1, 3, 2]))
    return _with_heads(op, scores, _heads(queries))


def _with_repeated_values(
    op: Any, weights: Any, values: Any, axis: Any, repeated: Any, flat: Any
) -> Any:
    return op.MatMul(weights, op.Reshape(op.Expand(op.Unsqueeze(values, axis), repeated), flat))


def _with_values(op: Any, weights: ir.Value, values: ir.Value, **_: Any) -> Any:
    """Multiply all attention weights that share a value head with it at once, without copies.

    before: values [b, kv heads, t, d] -> Unsqueeze -> Expand -> Reshape [b, heads, t, d]
            -> MatMul with weights [b, heads, s, t]
    after:  weights -> Reshape [b, kv heads, group * s, t] -> MatMul with values
            -> Reshape [b, heads, s, d]
    """
    stacked = _with_heads(op, weights, _heads(values))
    return _with_heads(op, op.MatMul(stacked, values), _heads(weights))


def _know_their_heads(context: Any, **found: ir.Value) -> bool:
    return all(
        _heads(found[name]) is not None
        for name in ("queries", "keys", "weights", "values")
        if name in found
    )


def _heads(tensor: ir.Value) -> int | None:
    """The second dimension of a 4-D tensor; None if it is not known."""
    if tensor.shape is None or len(tensor.shape) != 4:
        return None
    heads = tensor.shape[1]
    return heads if isinstance(heads, int) else None


def _with_heads(op: Any, tensor: Any, heads: int | None) -> Any:
    """Reshape to [b, heads, rows, size]: stack the rows of several heads, or split them again."""
    # In a Reshape, 0 keeps a dimension and -1 takes the rest.
    shape = ir.tensor(np.array([0, heads, -1, 0], np.int64))
    return op.Reshape(tensor, op.Constant(value=shape))


def _turned_twice(op: Any, x: Any) -> Any:
    """Heads that the model moves to axis 1, and that are moved back for ONNX Runtime's operator."""
    return op.Transpose(op.Transpose(x, perm=[0, 2, 1, 3]), perm=[0, 2, 1, 3])


def _reshaped_twice(op: Any, x: Any, first: Any, second: Any) -> Any:
    return op.Reshape(op.Reshape(x, first), second, _outputs=["back"])


def _itself(op: Any, x: ir.Value, **_: Any) -> Any:
    return op.Identity(x)


def _is_as_before(context: Any, x: ir.Value, back: ir.Value, **_: Any) -> bool:
    return x.shape is not None and x.shape == back.shape


def _masked_by_lowest(op: Any, visible: Any, zero: Any, lowest: Any) -> Any:
    return op.Where(visible, zero, lowest)


def _masked_by_half(op: Any, visible: ir.Value, zero: ir.Value, lowest: ir.Value) -> Any:
    """A mask that can be added to scores without overflow of the dtype.

    The lowest float16 and a score of -16 add up to -inf. With padding on the left, all scores of a
    padded row are then -inf and their softmax is NaN, which would reach the rows of real tokens
    through the KV cache.

    before: Where(visible, 0, lowest number)
    after:  Where(visible, 0, half of it)
    """
    assert lowest.const_value is not None
    half = ir.tensor(lowest.const_value.numpy() / 2)
    return op.Where(visible, zero, op.Constant(value=half))


def _is_lowest(context: Any, lowest: ir.Value, **_: Any) -> bool:
    constant = lowest.const_value
    if constant is None or constant.size != 1 or not constant.dtype.is_floating_point():
        return False
    return bool(constant.numpy().item() == constant.dtype.min)


def apply(graph: ir.Model) -> None:
    """Apply all rewrites, in place."""
    for rules in (
        (collapse_slice_rule,),  # slices of a whole tensor hide the patterns of the other rules
        (
            *RewriteRule(_times_reciprocal, _divided).commute(),
            RewriteRule(_with_repeated_keys, _with_keys, _know_their_heads),
            RewriteRule(_with_repeated_values, _with_values, _know_their_heads),
            RewriteRule(_masked_by_lowest, _masked_by_half, _is_lowest),
            RewriteRule(_turned_twice, _itself),
        ),
        (RewriteRule(_reshaped_twice, _itself, _is_as_before),),
    ):
        RewritePass(rules)(graph)
        common_passes.IdentityEliminationPass()(graph)
