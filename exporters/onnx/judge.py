"""The weights of a written graph: their names, shapes and patterns, read back from the file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from transformers import PreTrainedModel

from exporters.onnx import nbits, rotary
from thanos_deploy.bundle.graph_record import WeightRecord
from thanos_deploy.errors import GateError
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import Pattern


def require_names(path: Path, model: PreTrainedModel) -> None:
    """Require that the file has every parameter under its own name, and no other matrix.

    Raises:
        GateError: a parameter is missing, or a matrix is not a weight of the model.
    """
    shapes = {
        name: list(value.const_value.shape.numpy())
        for name, value in initializers_of(path).items()
        if value.const_value is not None
    }
    lost = [
        name
        for name, parameter in model.named_parameters()
        if shapes.get(name) not in (list(parameter.shape), list(parameter.shape)[::-1])
    ]
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    known |= {name for name in shapes if rotary.is_table(name)}
    # A vector with extra axes of length 1 is no matrix: rotary frequencies are broadcast like that.
    foreign = [
        name
        for name, shape in shapes.items()
        if sum(size > 1 for size in shape) > 1 and name not in known
    ]
    if lost or foreign:
        raise GateError(
            f"{path}: weights of the model that are not in the graph with their name and "
            f"shape: {', '.join(lost) or 'none'}; matrices in the graph that are not "
            f"weights of the model: {', '.join(foreign) or 'none'}",
            fix="report this model type; its graph hides the layers",
        )


def initializers_of(path: Path) -> Mapping[str, ir.Value]:
    """Return the initializers of a graph by name; their data stay in the file until read."""
    return ir.load(path).graph.initializers


def read(
    path: Path, model: PreTrainedModel, names: Sequence[str], patterns: Mapping[str, Pattern]
) -> list[WeightRecord]:
    """Find the weight of every linear layer in the written file, and judge its pattern there.

    Args:
        path: the ONNX file.
        model: the model that was exported.
        names: full names of the linear layers.
        patterns: the claimed patterns, by full name; a layer may have none.

    Raises:
        GateError: a weight does not hold its pattern, or feeds something else than a linear layer.
    """
    initializers = initializers_of(path)
    records = []
    for name in names:
        inputs = matrix(model.get_submodule(name)).shape[1]
        shape, axis, kept = nonzero(initializers, f"{name}.weight", inputs)
        pattern = patterns.get(name)
        verdict = None if pattern is None else judge(kept, pattern)
        if verdict is not None and not verdict.holds:
            raise GateError(
                f"{path}: {name}.weight does not hold {pattern} along axis {axis}",
                fix="check the checkpoint: a pruned layer changed after pruning",
            )
        records.append(
            WeightRecord(
                name=name,
                shape=shape,
                input_axis=axis,
                pattern=None if pattern is None else str(pattern),
                sparsity=float(1.0 - np.count_nonzero(kept) / kept.size),
                pattern_holds=None if verdict is None else verdict.holds,
            )
        )
    return records


def nonzero(
    initializers: Mapping[str, ir.Value], weight: str, inputs: int
) -> tuple[tuple[int, ...], int, NDArray[np.bool_]]:
    """Find the nonzero entries of a weight in an exported graph.

    Args:
        initializers: the initializers of the graph.
        weight: name of the weight in the model.
        inputs: number of input features of its layer.

    Returns:
        The shape of the weight in the file, its axis of input features, and bool[out, in]: true
        where an entry is not zero.

    Raises:
        GateError: the weight feeds something else than a linear layer.
    """
    if weight in initializers:
        value = initializers[weight]
        assert value.const_value is not None
        consumers = {use.node.op_type for use in value.uses()}
        if consumers not in ({"MatMul"}, {"DequantizeLinear"}):
            raise GateError(
                f"{weight} is used by {', '.join(sorted(consumers))} instead of one MatMul, so its "
                "pattern cannot be checked",
                fix="report this model type",
            )
        array = value.const_value.numpy()
        return array.shape, 0, (array != 0).T
    found = {
        part: initializers[part].const_value.numpy()  # type: ignore[union-attr]
        for part in nbits.parts(weight)
        if part in initializers
    }
    kept = nbits.levels(found, weight, inputs) != 0
    return kept.shape, 1, kept
