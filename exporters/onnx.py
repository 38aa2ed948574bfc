"""One ONNX graph for prefill and decode, with the kv cache as explicit inputs and outputs.

    inputs   input_ids                int64[batch, sequence]
             attention_mask           int64[batch, past + sequence]
             position_ids             int64[batch, sequence]
             past_key_values.0.key    float[batch, heads, past, dim]
             past_key_values.0.value  the same; and so on for every block
    outputs  logits                   float[batch, sequence, vocabulary]
             present.0.key            float[batch, heads, past + sequence, dim]
             present.0.value          the same; and so on for every block

Prefill is the case past = 0, decode the case sequence = 1. `float` is float32 or float16, as asked
for. `heads` and `dim` may differ from block to block; they are taken from the cache that the model
itself makes, never from its configuration. Every weight keeps its name in the model, and the
pattern is judged on the file that was written.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from exporters import _int8, _qdq, _rewrites
from thanos_deploy import artifact, onnxfile
from thanos_deploy.assignment import describe, every
from thanos_deploy.calibrate import builtin_text, segments
from thanos_deploy.checkpoint import Checkpoint, cast, load_model, load_tokenizer
from thanos_deploy.errors import GateError, UsageError
from thanos_deploy.linear import matrix
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.verdict import Verdict, judge

MODEL = "model.onnx"
DATA = "model.onnx.data"
RECORD = "export.json"

# What ONNX Runtime, TensorRT, TensorRT-RTX and OpenVINO all take.
OPSET = 20

# Largest difference between ONNX Runtime and PyTorch (in float32, on the same weights), relative
# to the values' range.
PARITY_LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4, "int8-qdq": 5e-3}

# Of the kv cache, the logits, and all weights that are not quantised.
_FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int8": torch.float32,
    "int8-qdq": torch.float16,
}

# What the ranges of activations are taken from, for int8-qdq: segments and tokens of each.
_SEGMENTS, _TOKENS = 8, 256

_STEPS = 4


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """A linear layer's weight in the written file.

    Attributes:
        name: the layer's full name in the model.
        shape: as it lies in the file.
        input_axis: the axis that is summed over, along which n:m groups run.
        sparsity: fraction of zeros.
        pattern: what it is claimed to hold; None for a dense one.
        pattern_holds: the pattern holds everywhere; None likewise.
    """

    name: str
    shape: tuple[int, ...]
    input_axis: int
    sparsity: float
    pattern: str | None
    pattern_holds: bool | None


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One comparison of ONNX Runtime with PyTorch; errors are relative to the range of the values.

    Attributes:
        name: what the case shows.
        batch, past, sequence: its shape.
        logits_error, cache_error: largest absolute difference over max - min of PyTorch's values,
            at positions that are not padding.
        first_differing: the first output, in the order in which the network computes them, that
            is off by more than the limit; None if none is.
    """

    name: str
    batch: int
    past: int
    sequence: int
    logits_error: float
    cache_error: float
    first_differing: str | None


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    pattern: Pattern | Mapping[str, Pattern] | None,
    dtype: str = "fp32",
    max_sequence: int | None = None,
    origin: Mapping[str, str] | None = None,
    on_progress: OnProgress = silent,
) -> artifact.Json:
    """Write `model.onnx`, `model.onnx.data` and `export.json`.

    Args:
        checkpoint: the model to export.
        destination: an existing folder.
        pattern: what all linear layers are claimed to hold, or each by its full name, or None for
            nothing.
        dtype: one of `PARITY_LIMITS`, of the weights; the cache and the logits are float16 for
            fp16 and int8-qdq, else float32. int8 (for ONNX Runtime, see `_int8`) and int8-qdq (for
            engines, see `_qdq`) are for the linear layers of the blocks.
        max_sequence: the most tokens, prompt and answer together, that the graph is meant for;
            None for all that the model takes.
        origin: what else the graph's metadata says of where it comes from.
        on_progress: told of every finished step.

    Returns:
        the content of export.json.

    Raises:
        UsageError: the model does not take sequences of `max_sequence`.
        ModelError: a weight does not fit the dtype.
        GateError: a weight is missing from the file, does not hold the pattern, or ONNX Runtime's
            results differ from PyTorch's by more than the limit.
    """
    longest = _longest(checkpoint, max_sequence)
    patterns = every(checkpoint.linears, pattern)
    claimed = describe(patterns, len(checkpoint.linears))
    on_progress(0, _STEPS)
    model = load_model(checkpoint.folder)
    cast(model, _FLOATS[dtype])
    on_progress(1, _STEPS)
    graph = _trace(model)
    _simplify(graph, model)
    claims = {
        "pattern": claimed or "none",
        "dtype": dtype,
        "max_sequence": str(longest),
        **(origin or {}),
    }
    graph.metadata_props.update({f"thanos_deploy.{key}": text for key, text in claims.items()})
    ir.save(graph, destination / MODEL, external_data=DATA)
    del graph
    on_progress(2, _STEPS)
    _require_names(destination / MODEL, model)
    cast(model, torch.float32)
    rounding: dict[str, float] = {}
    ranges: dict[str, _qdq.Ranges] = {}
    if dtype == "int8":
        rounding = _quantise(destination / MODEL, model, checkpoint.linears, _int8)
    if dtype == "int8-qdq":
        ranges = _observe(model, checkpoint)
        rounding = _quantise(destination / MODEL, model, list(ranges), _qdq)
    weights = _read_weights(destination / MODEL, model, checkpoint.linears, patterns)
    on_progress(3, _STEPS)
    limit = PARITY_LIMITS[dtype]
    cases = list(_compare(destination / MODEL, model, limit))
    if dtype == "int8":
        _int8.use_integer_kernels(destination / MODEL)
    if dtype == "int8-qdq":
        sparse = {name for name, its in patterns.items() if its == SemiStructured(2, 4)}
        _qdq.quantise_activations(destination / MODEL, ranges, results=sparse)
    if rounding:
        rounding["activations"] = _worst_logits(destination / MODEL, model)
    record = {
        "opset": OPSET,
        "dtype": dtype,
        "pattern": claimed,
        "max_sequence": longest,
        "cache": _cache_record(model, _FLOATS[dtype]),
        "rounding": rounding,
        "quantised": list(ranges) if dtype == "int8-qdq" else None,
        "parity_limit": limit,
        "parity": [asdict(case) for case in cases],
        "weights": [asdict(weight) for weight in weights],
    }
    _require_parity(destination / MODEL, cases, limit)
    artifact.write_json(destination / RECORD, record)
    on_progress(4, _STEPS)
    return record


def judge_file(
    path: Path, shapes: Mapping[str, tuple[int, int]], patterns: Mapping[str, Pattern]
) -> dict[str, Verdict]:
    """Judge linear layers of an exported file.

    Args:
        path: the ONNX file.
        shapes: by name of a layer, its outputs and inputs.
        patterns: by name of a layer, what it is claimed to hold.

    Returns:
        by name, of the layers that have a pattern.
    """
    onnxfile.require_own_data(path)
    initializers = _initializers(path)
    return {
        name: judge(_nonzero(initializers, f"{name}.weight", shapes[name][1])[2], pattern)
        for name, pattern in patterns.items()
    }


def _observe(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, _qdq.Ranges]:
    """The linear layers whose input can be rounded to int8, and what was seen around them."""
    ids = segments(
        builtin_text(),
        load_tokenizer(checkpoint.folder),
        count=_SEGMENTS,
        length=min(_TOKENS, checkpoint.max_positions),
        seed=0,
    )
    seen = _qdq.observe(model, checkpoint.linears, ids)
    return {name: ranges for name, ranges in seen.items() if ranges.input.fits}


def _quantise(
    path: Path, model: PreTrainedModel, names: Sequence[str], quantisation: ModuleType
) -> dict[str, float]:
    """Round the blocks' linear layers to int8, in the file and in the model.

    Returns:
        "weights": how far that moves the logits, relative to their range.
    """
    quantisation.quantise(path, {f"{name}.weight" for name in names})
    moved = _worst_logits(path, model)
    initializers = {
        name: value.const_value.numpy()
        for name, value in _initializers(path).items()
        if value.const_value is not None
    }
    for name in names:
        weight = matrix(model.get_submodule(name))
        rounded = quantisation.read(initializers, f"{name}.weight", weight.shape[1])
        weight.data.copy_(torch.from_numpy(rounded))
    return {"weights": moved}


def _worst_logits(path: Path, model: PreTrainedModel) -> float:
    return max(case.logits_error for case in _compare(path, model, float("inf")))


def _longest(checkpoint: Checkpoint, asked: int | None) -> int:
    """The most tokens that the graph is meant for."""
    if asked is not None and not 1 <= asked <= checkpoint.max_positions:
        raise UsageError(
            f"--max-seq {asked}: the model takes 1 to {checkpoint.max_positions} tokens",
            fix="give a number in that range, or leave --max-seq out",
        )
    return asked or checkpoint.max_positions


class _WithFlatCache(nn.Module):
    """A causal model whose cache goes in and out as a flat list: key 0, value 0, key 1, ..."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
        )
        return (output.logits, *_flat(output.past_key_values))


def _flat(cache: DynamicCache) -> list[Tensor]:
    return [tensor for keys, values, *_ in cache for tensor in (keys, values)]


def _empty_cache(model: PreTrainedModel, batch: int, past: int) -> list[Tensor]:
    """A cache of zeros whose heads and dims are those that each block really has."""
    with torch.inference_mode():
        # Without the configuration no block's cache is cut to its window: every length is `past`.
        seen = model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache())
    return [
        torch.zeros(batch, tensor.shape[1], past, tensor.shape[3], dtype=tensor.dtype)
        for tensor in _flat(seen.past_key_values)
    ]


def _cache_record(model: PreTrainedModel, dtype: torch.dtype) -> artifact.Json:
    """What the kv cache needs: heads and dims by block, and bytes for each token."""
    tensors = _empty_cache(model, 1, 1)
    return {
        "blocks": [
            {"heads": keys.shape[1], "key_dim": keys.shape[3], "value_dim": values.shape[3]}
            for keys, values in zip(tensors[::2], tensors[1::2], strict=True)
        ],
        "bytes_per_token": sum(tensor.numel() for tensor in tensors) * dtype.itemsize,
    }


def _trace(model: PreTrainedModel) -> ir.Model:
    # 0 and 1 would be taken for constants, so every dynamic size of the example is at least 2.
    batch, past, sequence = 2, 5, 3
    seen = _empty_cache(model, batch, past)
    example = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        torch.arange(past, past + sequence).expand(batch, sequence),
        seen,
    )
    cache = [f"{layer}.{part}" for layer in range(len(seen) // 2) for part in ("key", "value")]
    usual = model.config._attn_implementation
    # Step by step, attention is fewer nodes than the exporter's own decomposition of it, which
    # turns the keys by way of their shape, scales them, and looks for NaN after the softmax.
    model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        # The exporter warns about its own internals; the result is compared with the model below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _WithFlatCache(model).eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes={
                "input_ids": {0: "batch", 1: "sequence"},
                "attention_mask": {0: "batch", 1: "total"},
                "position_ids": {0: "batch", 1: "sequence"},
                "past": [{0: "batch", 2: "past"}] * len(seen),
            },
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in cache),
            ],
            output_names=["logits", *(f"present.{name}" for name in cache)],
        )
    model.set_attn_implementation(usual)
    assert program is not None
    return program.model


def _simplify(graph: ir.Model, model: PreTrainedModel) -> None:
    """Make the exporter's raw graph small, and keep the names of the weights.

    before: weight "model.lm.layers.0.fc1.weight" [out, in] -> Transpose -> MatMul; thousands of
            constants, casts and repeated shape computations
            weight "model.lm.layers.0.fc2.weight" [out, in] -> Gemm
    after:  weight "lm.layers.0.fc1.weight" [in, out] -> MatMul
            weight "lm.layers.0.fc2.weight" [in, out] -> MatMul -> Add
            and what `_rewrites` describes

    The exporter's own optimiser takes as long as the export itself (mostly rules that match nothing
    here), loses the names, and ends with a graph of the same size and speed.
    """
    # The exporter calls tied parameters by one of their names, and not by that of the model.
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    own_names = {
        name: owners[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    names = set(owners.values())
    weights = graph.graph.initializers
    for value in list(weights.values()):
        assert value.name is not None
        name = value.name.removeprefix("model.")  # the attribute of `_WithFlatCache`
        value.name = own_names.get(name, name)
    for node in list(graph.graph):
        if node.op_type == "Gemm":
            _split_gemm(graph.graph, node)
    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        # A tied output head is the embedding transposed: folding it would store it twice.
        if weight is None or weight.name not in weights or len(weight.uses()) != 1:
            continue
        _transpose(weight, node.attributes["perm"].as_ints())
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.graph.remove(node, safe=True)
    fold_constants(
        graph,
        # Gemma adds 1 to the weights of its norms; folded, they would be no weights of the model.
        should_fold=lambda node: (
            False
            if any(value is not None and value.name in names for value in node.inputs)
            else None
        ),
    )
    common_passes.RemoveUnusedNodesPass()(graph)
    _rewrites.apply(graph)
    for simplify in (
        common_passes.RemoveUnusedNodesPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        # Nodes remember the source lines that they come from, with the paths of this machine.
        common_passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(graph)
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.name in names:
            # Whoever builds an engine speaks of nodes; let them be called as the model calls them.
            node.name = weight.name.removesuffix(".weight")


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    """One form for all linear layers: Gemm(x, W, b) becomes Add(MatMul(x, W), b); b is optional."""
    x, weight, *bias = gemm.inputs
    assert weight is not None
    alpha, beta, flipped = (gemm.attributes.get(key) for key in ("alpha", "beta", "transA"))
    scaled = any(factor is not None and factor.as_float() != 1 for factor in (alpha, beta))
    if scaled or (flipped is not None and flipped.as_int()) or len(weight.uses()) != 1:
        return  # no linear layer
    turned = gemm.attributes.get("transB")
    if turned is not None and turned.as_int():
        _transpose(weight, (1, 0))
    nodes = [ir.node("MatMul", [x, weight], name=gemm.name)]
    nodes += (ir.node("Add", [nodes[0].outputs[0], value]) for value in bias)
    total = nodes[-1].outputs[0]
    total.shape, total.type = gemm.outputs[0].shape, gemm.outputs[0].type
    graph.insert_before(gemm, nodes)
    ir.convenience.replace_all_uses_with(gemm.outputs[0], total)
    graph.remove(gemm, safe=True)


def _transpose(weight: ir.Value, axes: Sequence[int]) -> None:
    assert weight.const_value is not None
    folded = ir.Tensor(weight.const_value.numpy().transpose(axes), name=weight.name)
    weight.const_value = folded
    weight.shape = folded.shape


def _require_names(path: Path, model: PreTrainedModel) -> None:
    """Every parameter lies in the file under its own name, and no other matrix does."""
    shapes = {
        name: list(value.const_value.shape)
        for name, value in _initializers(path).items()
        if value.const_value is not None
    }
    lost = [
        name
        for name, parameter in model.named_parameters()
        if shapes.get(name) not in (list(parameter.shape), list(parameter.shape)[::-1])
    ]
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    foreign = [name for name, shape in shapes.items() if len(shape) > 1 and name not in known]
    if lost or foreign:
        raise GateError(
            f"{path}: without their names or shapes: {', '.join(lost) or 'none'}; matrices that "
            f"the model does not name: {', '.join(foreign) or 'none'}",
            fix="report this model type; its graph hides the layers",
        )


def _initializers(path: Path) -> Mapping[str, ir.Value]:
    return ir.load(path).graph.initializers


def _read_weights(
    path: Path, model: PreTrainedModel, names: Sequence[str], patterns: Mapping[str, Pattern]
) -> list[WeightRecord]:
    """Find every pruned layer's weight in the written file, and judge it there."""
    initializers = _initializers(path)
    records = []
    for name in names:
        inputs = matrix(model.get_submodule(name)).shape[1]
        shape, axis, nonzero = _nonzero(initializers, f"{name}.weight", inputs)
        pattern = patterns.get(name)
        verdict = None if pattern is None else judge(nonzero, pattern)
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
                sparsity=float(1.0 - np.count_nonzero(nonzero) / nonzero.size),
                pattern_holds=None if verdict is None else verdict.holds,
            )
        )
    return records


def _nonzero(
    initializers: Mapping[str, ir.Value], weight: str, inputs: int
) -> tuple[tuple[int, ...], int, NDArray[np.bool_]]:
    """A weight's shape in the file, the axis that is summed over, and bool[out, in]: not zero."""
    if weight in initializers:
        value = initializers[weight]
        assert value.const_value is not None
        consumers = {use.node.op_type for use in value.uses()}
        if consumers not in ({"MatMul"}, {"DequantizeLinear"}):
            raise GateError(
                f"{weight} feeds {', '.join(sorted(consumers))}, not one MatMul",
                fix="report this model type; its graph hides the layer",
            )
        array = value.const_value.numpy()
        return array.shape, 0, (array != 0).T
    quantised = initializers[f"{weight}_Q8"].const_value
    assert quantised is not None
    array = quantised.numpy()
    return array.shape, 1, array.reshape(len(array), -1)[:, :inputs] != _int8.ZERO


def _compare(path: Path, model: PreTrainedModel, limit: float) -> Iterator[ParityCase]:
    """Run ONNX Runtime beside PyTorch through prefill, chunked prefill, decode and left padding."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime turns int8 weights behind a DequantizeLinear into its own MatMulNBits, and would
    # round the activations to int8 on its own account.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()[3:]]
    outputs = [value.name for value in session.get_outputs()]
    stored = np.float16 if session.get_outputs()[0].type == "tensor(float16)" else np.float32
    text = _sample(model, rows=3, length=12)
    wrapped = _WithFlatCache(model).eval()

    def case(
        name: str, sequence: int, past: list[Tensor], mask: Tensor
    ) -> tuple[ParityCase, list[Tensor]]:
        batch, total = mask.shape
        ids = text[:batch, total - sequence : total]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -sequence:]
        with torch.inference_mode():
            expected = wrapped(ids, mask, positions, past)
        feeds = {
            name: entry.numpy().astype(stored) for name, entry in zip(names, past, strict=True)
        }
        actual = session.run(
            None,
            {
                "input_ids": ids.numpy(),
                "attention_mask": mask.numpy(),
                "position_ids": positions.numpy(),
                **feeds,
            },
        )
        real = mask.bool()
        errors = {
            "logits": _relative(
                expected[0][real[:, -sequence:]], actual[0][real[:, -sequence:].numpy()]
            )
        }
        for output, want, got in zip(outputs[1:], expected[1:], actual[1:], strict=True):
            # [batch, heads, total, dim]: bring the token axis beside the batch axis.
            errors[output] = _relative(want.transpose(1, 2)[real], got.swapaxes(1, 2)[real.numpy()])
        # Written so that NaN is beyond the limit.
        beyond = [output for output in (*outputs[1:], "logits") if not errors[output] <= limit]
        compared = ParityCase(
            name,
            batch,
            past[0].shape[2],
            sequence,
            logits_error=errors["logits"],
            cache_error=float(np.max([errors[output] for output in outputs[1:]])),
            first_differing=beyond[0] if beyond else None,
        )
        return compared, [tensor.clone() for tensor in expected[1:]]

    compared, cache = case(
        "prefill", 7, _empty_cache(model, 1, 0), torch.ones(1, 7, dtype=torch.long)
    )
    yield compared
    compared, cache = case("chunked prefill", 4, cache, torch.ones(1, 11, dtype=torch.long))
    yield compared
    yield case("decode", 1, cache, torch.ones(1, 12, dtype=torch.long))[0]
    padded = torch.ones(3, 6, dtype=torch.long)
    padded[1, :2] = 0
    padded[2, :5] = 0
    compared, cache = case("left-padded batch", 6, _empty_cache(model, 3, 0), padded)
    yield compared
    yield case("decode of that batch", 1, cache, nn.functional.pad(padded, (0, 1), value=1))[0]


def _sample(model: PreTrainedModel, *, rows: int, length: int) -> Tensor:
    """int64[rows, length], sampled from the model itself with a fixed seed.

    Tokens drawn evenly from the vocabulary are nothing that a trained model has seen: now and then
    one of them sits on an edge where float32 rounding alone moves the logits by 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
    with torch.inference_mode():
        while ids.shape[1] < length:
            odds = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
    return ids


def _relative(want: Tensor, got: NDArray[np.floating]) -> float:
    expected = want.numpy()
    spread = float(expected.max() - expected.min())
    return float(np.abs(expected - got).max()) / (spread or 1.0)


def _require_parity(path: Path, cases: list[ParityCase], limit: float) -> None:
    for case in cases:
        if case.first_differing is not None:
            raise GateError(
                f"{path}: {case.name} (batch {case.batch}, past {case.past}, sequence "
                f"{case.sequence}): {case.first_differing} is the first output that differs from "
                f"PyTorch's by more than {limit:g} of its range (logits by "
                f"{case.logits_error:.2g}, the kv cache by up to {case.cache_error:.2g})",
                fix="report the model and the versions of torch and onnxruntime",
            )
