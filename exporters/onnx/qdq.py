"""int8 for engines: weights and activations of the linear layers, as explicit Q/DQ nodes.

before: MatMul(x, W) with W float16 [in, out]
after:  MatMul(DQ(Q(x)), DQ(W8)) with W8 int8[in, out] and a scale for each output, and, for 2:4
        weights, DQ(Q(.)) around the result as well

Quantisation is symmetric, so a zero stays exactly zero and n:m patterns survive. The codes of the
weights are those of a model that was quantised with one scale for each output; a model that was not
quantised is rounded to such codes.

An activation tensor has a single scale, because engines multiply int8 by int8 and scale once,
afterwards. It comes from the largest magnitude that was seen on the calibration part of the
built-in text, whatever text the model was pruned with. Language models have a few activations that
are larger than all others by orders of magnitude, and rounding to steps of that size would leave
nothing of the others. So a tensor whose tokens lose `WORST_ERROR` of their energy or more, on
average, is not quantised, and neither is a layer that reads it.

TensorRT takes a sparse int8 kernel only where the result is int8 too: NVIDIA's Model-Optimizer,
README of its example for sparse int8 (TensorRT 10.14: 140 of 196 eligible layers with quantised
results).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thanos_deploy.solver.codes import Quantised

LARGEST = 127

# Mean over tokens of |rounded - x|^2 / |x|^2; see benchmarks/LOG.md.
WORST_ERROR = 0.01


@dataclass(frozen=True, slots=True)
class Range:
    """Range of one activation tensor, as observed on the calibration data.

    Attributes:
        largest: largest magnitude.
        error: mean over tokens of the fraction of a token's energy that rounding to int8 loses.
    """

    largest: float
    error: float

    @property
    def fits(self) -> bool:
        """Whether rounding to int8 loses less than `WORST_ERROR`."""
        return self.error < WORST_ERROR


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges of the input and the output of a linear layer."""

    input: Range
    output: Range


def observe(model: nn.Module, names: Sequence[str], ids: Tensor) -> dict[str, Ranges]:
    """Measure the ranges of the inputs and outputs of linear layers.

    The model is run twice: for the largest magnitudes, then for the errors of rounding with them.

    Args:
        model: the model, in float32.
        names: full names of the layers.
        ids: int64[segments, tokens], run one segment at a time.
    """
    largest = {name: [0.0, 0.0] for name in names}
    errors = {name: [0.0, 0.0] for name in names}

    def magnitudes(name: str, activations: tuple[Tensor, Tensor]) -> None:
        for side, values in enumerate(activations):
            largest[name][side] = max(largest[name][side], float(values.abs().max()))

    def losses(name: str, activations: tuple[Tensor, Tensor]) -> None:
        for side, values in enumerate(activations):
            errors[name][side] += lost(values, largest[name][side]) / len(ids)

    for look in (magnitudes, losses):
        with ExitStack() as stack, torch.inference_mode():
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(_hook(look, name))
                stack.callback(handle.remove)
            for segment in ids:
                model(input_ids=segment[None], use_cache=False)
    return {
        name: Ranges(*(Range(*side) for side in zip(largest[name], errors[name], strict=True)))
        for name in names
    }


def lost(values: Tensor, largest: float) -> float:
    """Return the mean over tokens of the fraction of energy that rounding to int8 loses.

    The energy of a token is the sum of the squares of its channels.

    Args:
        values: float[..., tokens, channels].
        largest: the magnitude that maps to code 127.
    """
    step = (largest or 1.0) / LARGEST
    rounded = (values / step).round().clamp(-LARGEST, LARGEST) * step
    energy = values.square().sum(dim=-1)
    return float(((rounded - values).square().sum(dim=-1) / energy.clamp_min(1e-30)).mean())


def _hook(
    look: Callable[[str, tuple[Tensor, Tensor]], None], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        look(name, (inputs[0], output))

    return hook


def quantise(path: Path, weights: Mapping[str, Quantised]) -> None:
    """Replace weights of a written graph by int8 codes, in place; activations stay float.

    Args:
        path: the ONNX file.
        weights: maps the name of a weight to symmetric 8-bit codes with one scale for each row; the
            scales must be exact in every float dtype.
    """
    model = ir.load(path)
    for name, quantised in weights.items():
        weight = model.graph.initializers[name]
        assert weight.const_value is not None
        scales = quantised.scale[:, 0].numpy().astype(weight.const_value.dtype.numpy())
        codes = np.ascontiguousarray(quantised.codes.numpy().T.astype(np.int8))
        (product,) = (use.node for use in weight.uses())
        weight.const_value = ir.Tensor(codes, name=name)
        weight.dtype = ir.DataType.INT8
        scale = _constant(model.graph, f"{name}.scale", scales)
        back = ir.node("DequantizeLinear", [weight, scale], attributes={"axis": 1})
        back.outputs[0].shape, back.outputs[0].type = weight.shape, scale.type
        model.graph.insert_before(product, back)
        product.replace_input_with(1, back.outputs[0])
    _save(model, path)


def quantise_activations(
    path: Path, ranges: Mapping[str, Ranges], *, results: Collection[str]
) -> None:
    """Quantise the inputs of linear layers of a written graph, in place.

    Args:
        path: the ONNX file.
        ranges: maps the name of a layer to its ranges, as `observe` returned them.
        results: names of the layers whose output is quantised too, if it fits; see `Range.fits`.
    """
    model = ir.load(path)
    rounded: dict[ir.Value, ir.Value] = {}  # q, k and v read the same tensor
    for node in list(model.graph):
        if node.op_type != "MatMul" or node.name is None or node.name not in ranges:
            continue
        seen, source = ranges[node.name], node.inputs[0]
        assert source is not None
        if source not in rounded:
            pair = _pair(model.graph, f"{node.name}.input", source, seen.input.largest)
            model.graph.insert_before(node, pair)
            rounded[source] = pair[-1].outputs[0]
        node.replace_input_with(0, rounded[source])
        if node.name in results and seen.output.fits:
            result = node.outputs[0]
            pair = _pair(model.graph, f"{node.name}.output", result, seen.output.largest)
            model.graph.insert_after(node, pair)
            ir.convenience.replace_all_uses_with(result, pair[-1].outputs[0])
            pair[0].replace_input_with(0, result)
    _save(model, path)


def _pair(graph: ir.Graph, name: str, source: ir.Value, largest: float) -> list[ir.Node]:
    dtype = np.float16 if source.dtype == ir.DataType.FLOAT16 else np.float32
    scale = _constant(graph, f"{name}.scale", np.array((largest or 1.0) / LARGEST, dtype=dtype))
    zero = _constant(graph, f"{name}.zero", np.array(0, dtype=np.int8))
    there = ir.node("QuantizeLinear", [source, scale, zero])
    there.outputs[0].shape, there.outputs[0].type = source.shape, zero.type
    back = ir.node("DequantizeLinear", [there.outputs[0], scale, zero])
    back.outputs[0].shape, back.outputs[0].type = source.shape, source.type
    return [there, back]


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _save(model: ir.Model, path: Path) -> None:
    """Write a graph back to its file; its data are read first, since their file is overwritten."""
    ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=f"{path.name}.data")
