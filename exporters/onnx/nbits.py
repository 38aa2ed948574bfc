"""Weights of 8 and 4 bits in an exported graph, for ONNX Runtime's operator MatMulNBits.

before: MatMul(x, W) with W float32 [in, out]
after:  MatMulNBits(x, Q, S) or MatMulNBits(x, Q, S, Z) with S float32[out, blocks],
        W[i, o] = (Q[o, i] - Z[o, i // group]) * S[o, i // group]

Q is uint8[out, blocks, group * bits / 8] and Z uint8[out, blocks * bits / 8, rounded up]; of two
codes of 4 bits in a byte, the first is in the lower half. Without the input Z, the zero point is
2^(bits - 1). MatMulNBits is an operator of ONNX Runtime (com.microsoft), which TensorRT does not
read.

An output head that is the transposed embedding shares its 8-bit codes with the embedding:

before: Gather(W, ids), MatMul(x, Transpose(W)) with W float32 [tokens, in]
after:  GatherBlockQuantized(Reshape(Q), ids, S), MatMulNBits(x, Q, S)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exporters import bits
from thanos_deploy.solver.codes import Quantised

DOMAIN = "com.microsoft"
OPERATOR = "MatMulNBits"

# Suffixes of the initializers that replace a weight; the codes by number of bits.
_CODES = {8: "_Q8", 4: "_Q4"}
_SCALES, _ZEROS = "_scales", "_zero_points"

# Value of accuracy_level with which the activations are rounded to int8 too. With float32
# activations the CPU kernel was slower than the kernel for float32 weights (benchmarks/LOG.md).
_INTEGER_KERNELS = 4


# Block size for a weight with one scale for each row, since the operator needs blocks.
_BLOCK = 128


def write(path: Path, weights: Mapping[str, Quantised]) -> None:
    """Replace weights of a written graph by codes, in place; activations stay in float32.

    Args:
        path: the ONNX file, with its data beside it.
        weights: maps the name of a weight, which a MatMul reads directly or through a Transpose, to
            its codes.
    """
    weights = {
        name: one.grouped(_BLOCK) if one.grid.group is None else one
        for name, one in weights.items()
    }
    model = onnx.load(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    for node in model.graph.node:
        if node.op_type == "MatMul":
            if node.input[1] in turned:
                node.input[1] = turned[node.input[1]].input[0]
            if node.input[1] in weights:
                _replace(node, weights[node.input[1]])
    for transpose in turned.values():
        model.graph.node.remove(transpose)
        _share_rows(model.graph, transpose.input[0], weights[transpose.input[0]])
    for name, quantised in weights.items():
        model.graph.initializer.remove(initializers[name])
        model.graph.initializer.extend(_initializers(name, quantised))
    if all(one.domain != DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    # Small tensors stay in the graph: ONNX Runtime needs shapes there.
    onnx.save(model, path, save_as_external_data=True, location=data.name)


def use_integer_kernels(path: Path) -> None:
    """Let ONNX Runtime round the activations to int8 as well, which makes the graph fast."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            node.attribute.append(helper.make_attribute("accuracy_level", _INTEGER_KERNELS))
    onnx.save(model, path)


def parts(weight: str) -> tuple[str, ...]:
    """Return the names that the initializers of a quantised weight can have."""
    return tuple(f"{weight}{part}" for part in (*_CODES.values(), _SCALES, _ZEROS))


def levels(
    initializers: Mapping[str, NDArray[np.generic]], weight: str, inputs: int
) -> NDArray[np.int16]:
    """Return code minus zero point for each entry of a quantised weight: int16[out, in].

    An entry of 0 stands for a weight of exactly zero.

    Args:
        initializers: the initializers of the graph, by name.
        weight: name of the weight before it was quantised.
        inputs: number of input features; the last block is padded beyond them.
    """
    width = 4 if f"{weight}{_CODES[4]}" in initializers else 8
    packed, scales = (initializers[f"{weight}{part}"] for part in (_CODES[width], _SCALES))
    rows, blocks = scales.shape
    codes = bits.unpack(packed.reshape(rows, -1), width)
    group = codes.shape[1] // blocks
    zeros = initializers.get(f"{weight}{_ZEROS}")
    if zeros is None:
        codes -= 2 ** (width - 1)
    else:
        codes -= bits.unpack(zeros.reshape(rows, -1), width)[:, :blocks].repeat(group, axis=1)
    return codes[:, :inputs]


def _replace(node: onnx.NodeProto, quantised: Quantised) -> None:
    """Turn a MatMul into a MatMulNBits, in place."""
    name, grid = node.input[1], quantised.grid
    outputs, inputs = quantised.codes.shape
    parts = [_CODES[grid.bits], _SCALES, *([] if grid.symmetric else [_ZEROS])]
    del node.input[1]
    node.input.extend(f"{name}{part}" for part in parts)
    node.op_type, node.domain = OPERATOR, DOMAIN
    group = grid.width(inputs)
    attributes = {"K": inputs, "N": outputs, "bits": grid.bits, "block_size": group}
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())


def _share_rows(graph: onnx.GraphProto, name: str, quantised: Quantised) -> None:
    """Let the embedding look up its rows in the codes of the output head."""
    grid = quantised.grid
    codes, scales = f"{name}{_CODES[grid.bits]}", f"{name}{_SCALES}"
    rows, shape = f"{codes}_rows", f"{codes}_rows_shape"
    sizes = np.array(quantised.codes.shape, np.int64)
    graph.initializer.append(numpy_helper.from_array(sizes, shape))
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] == name:
            ids = node.input[1]
            del node.input[:], node.attribute[:]
            node.input.extend([rows, ids, scales])
            node.op_type, node.domain = "GatherBlockQuantized", DOMAIN
            attributes = {"bits": grid.bits, "block_size": grid.group}
            attributes |= {"gather_axis": 0, "quantize_axis": 1}
            node.attribute.extend(helper.make_attribute(*one) for one in attributes.items())
    graph.node.insert(0, helper.make_node("Reshape", [codes, shape], [rows]))


def _initializers(name: str, quantised: Quantised) -> list[onnx.TensorProto]:
    grid = quantised.grid
    middle = 2 ** (grid.bits - 1) if grid.symmetric else 0
    codes = quantised.codes.numpy() + middle
    rows, cols = codes.shape
    blocks, group = grid.groups(cols), grid.width(cols)
    zeros = (quantised.zero.numpy() + middle).astype(np.int16)
    # The padding of the last block has no effect: the operator multiplies K inputs only.
    padded = np.pad(codes, ((0, 0), (0, blocks * group - cols)), constant_values=middle)
    found: dict[str, NDArray[Any]] = {
        _CODES[grid.bits]: bits.pack(padded, grid.bits).reshape(rows, blocks, -1),
        _SCALES: quantised.scale.numpy().astype(np.float32),
    }
    if not grid.symmetric:
        found[_ZEROS] = bits.pack(zeros, grid.bits)
    return [numpy_helper.from_array(array, f"{name}{part}") for part, array in found.items()]
