"""Rewrite the linear layers of a graph as 1x1 convolutions.

TensorRT has had sparse kernels for convolutions longer than for matrix products, and the compiler
that takes over the matrix products of a transformer used to ignore sparsity (NVIDIA/TensorRT issue
2271). Which form is faster has to be measured on a GPU.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes


def rewrite(source: Path, destination: Path, *, weights: Collection[str], data: str) -> None:
    """Write a copy of a graph whose linear layers are convolutions.

    before: MatMul(x [batch, sequence, in], W [in, out])
    after:  Transpose -> [batch, in, sequence] -> Unsqueeze -> [batch, in, sequence, 1]
            -> Conv with W^T [out, in, 1, 1] -> [batch, out, sequence, 1] -> Squeeze -> Transpose

    In GPT-2, x is 2-D, [tokens, in], so the transposes are left out. A quantised weight still goes
    through its DequantizeLinear, with axis 0 instead of 1.

    Args:
        source: the graph to read.
        destination: the graph to write.
        weights: names of the weights whose MatMul is rewritten.
        data: name of the file for the weights, beside the written graph.
    """
    model = ir.load(source)
    graph = model.graph
    for node in list(graph):
        if node.op_type == "MatMul":
            _replace(graph, node, weights)
    for simplify in (
        # q, k and v read the same input, so it is transposed only once.
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
    ):
        simplify(model)
    ir.save(model, destination, external_data=data)


def _replace(graph: ir.Graph, product: ir.Node, weights: Collection[str]) -> None:
    source, operand = product.inputs
    assert source is not None
    assert operand is not None
    back = operand.producer()
    if back is not None and back.op_type != "DequantizeLinear":
        return
    weight = operand if back is None else back.inputs[0]
    if weight is None or weight.name not in weights:
        return
    assert weight.const_value is not None
    assert source.shape is not None
    kernel = np.ascontiguousarray(weight.const_value.numpy().T)[:, :, None, None]
    weight.const_value = ir.Tensor(kernel, name=weight.name)
    weight.shape = operand.shape = weight.const_value.shape
    if back is not None:
        back.attributes["axis"] = ir.AttrInt64("axis", 0)
    convolution = ir.node("Conv", [None, operand], name=product.name)
    if source.shape.rank() == 2:
        axes = _axes(graph, 2, 3)
        before = [ir.node("Unsqueeze", [source, axes])]
        after = [ir.node("Squeeze", [convolution.outputs[0], axes])]
    else:
        axes = _axes(graph, 3)
        turned = ir.node("Transpose", [source], attributes={"perm": [0, 2, 1]})
        before = [turned, ir.node("Unsqueeze", [turned.outputs[0], axes])]
        narrow = ir.node("Squeeze", [convolution.outputs[0], axes])
        back = ir.node("Transpose", [narrow.outputs[0]], attributes={"perm": [0, 2, 1]})
        after = [narrow, back]
    convolution.replace_input_with(0, before[-1].outputs[0])
    result = after[-1].outputs[0]
    result.shape, result.type = product.outputs[0].shape, product.outputs[0].type
    graph.insert_before(product, [*before, convolution, *after])
    ir.convenience.replace_all_uses_with(product.outputs[0], result)
    graph.remove(product, safe=True)


def _axes(graph: ir.Graph, *axes: int) -> ir.Value:
    """The initializer with these axes; created at the first call."""
    name = f"axes_{'_'.join(map(str, axes))}"
    if name not in graph.initializers:
        tensor = ir.Tensor(np.array(axes, dtype=np.int64), name=name)
        graph.register_initializer(
            ir.Value(
                name=name,
                shape=tensor.shape,
                type=ir.TensorType(ir.DataType.INT64),
                const_value=tensor,
            )
        )
    return graph.initializers[name]
