"""One ONNX graph for prefill and decode, with the KV cache as explicit inputs and outputs.

    inputs   input_ids                int64[batch, sequence]
             attention_mask           int64[batch, past + sequence]
             position_ids             int64[batch, sequence]
             past_key_values.0.key    float[batch, heads, past, dim]
             past_key_values.0.value  the same; and so on for every block
    outputs  logits                   float[batch, sequence, vocabulary], or [batch, 1, vocabulary]
             present.0.key            float[batch, heads, past + sequence, dim]
             present.0.value          the same; and so on for every block

Prefill is the case past = 0, decode the case sequence = 1. `float` is float32 or float16, depending
on the dtype asked for. A graph as above is called neutral; its padding is on the left of a row.

A graph for ONNX Runtime alone ("ort", see `exporters.onnx.attention`) has the same inputs and
outputs, with padding on the right: `attention_mask` has as many ones as a row has tokens, and the
new tokens of a row are written to the cache behind its last token. Past and present may be one
buffer of any length, which is then written in place; otherwise present has the shape above. In a
batch of several rows, either all rows start with an empty cache, or each gets one token.

`heads` and `dim` may differ from block to block; they are taken from the cache that the model
itself makes, never from its configuration. Every weight keeps its name in the model, and the
pattern is judged on the file that was written.

Generating text needs the logits after the last token only, and the output head is one of the
largest products of a prefill. With `logits` "last", the graph applies the head to the last token
only; with "all" it gives the logits after every token, which perplexity needs. The second dimension
of the logits shows which of the two a graph has. The choice is fixed at export: as an input of the
graph it would make that dimension depend on a value, for which TensorRT, Triton and ORT-GenAI would
each need settings of their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.onnx import attention, nbits, parity, qdq, trace
from exporters.onnx import judge as _weights
from thanos_deploy.bundle import files, onnxfile
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.graph_record import CacheBlock, CacheRecord, GraphRecord
from thanos_deploy.bundle.layout import GRAPH, GRAPH_DATA, GRAPH_RECORD
from thanos_deploy.calibration.segments import segments
from thanos_deploy.calibration.texts import builtin_text
from thanos_deploy.errors import UsageError
from thanos_deploy.model.assignment import describe, every
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.rounding import cast
from thanos_deploy.model.verdict import Verdict, judge
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.solver.codes import Quantised, round_to
from thanos_deploy.solver.grid import Grid

# Logits after every token, or after the last token only.
LOGITS = ("all", "last")

# Dtype of the KV cache, the logits, and all weights that are not quantised.
_FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int8": torch.float32,
    "int4": torch.float32,
    "int8-qdq": torch.float16,
}

# Calibration data for the activation ranges of int8-qdq: number of segments, and tokens in each.
_SEGMENTS, _TOKENS = 8, 256

_STEPS = 4

# Grid that the weights are rounded to for each dtype, if the model was not quantised.
GRIDS = {"int8": Grid(8), "int4": Grid(4), "int8-qdq": Grid(8, None)}

# Grid of the output head in int8 and int4 graphs for ONNX Runtime alone.
_HEAD = Grid(8)


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    pattern: Pattern | Mapping[str, Pattern] | None,
    dtype: str = "fp32",
    max_sequence: int | None = None,
    logits: str = "all",
    graph: str = "neutral",
    codes: Codes | None = None,
    origin: Mapping[str, str] | None = None,
    on_progress: OnProgress = silent,
) -> GraphRecord:
    """Write `model.onnx`, `model.onnx.data` and `export.json`.

    Args:
        checkpoint: the model to export.
        destination: an existing folder.
        pattern: the pattern claimed for all linear layers, or for each layer by its full name;
            None for no pattern.
        dtype: dtype of the weights, a key of `parity.LIMITS`; the cache and the logits are float16
            for fp16 and int8-qdq, else float32. int8 and int4 (for ONNX Runtime, see `nbits`) and
            int8-qdq (for engines, see `qdq`) apply to the linear layers of the blocks; in a graph
            for ONNX Runtime alone the output head has 8 bits too.
        max_sequence: the most tokens, prompt and answer together, that the graph is meant for;
            None for all that the model takes.
        logits: one of `LOGITS`.
        graph: "neutral", or "ort" for ONNX Runtime's own attention where it fits the model; where
            it does not, the graph is neutral and the record says why.
        codes: for int8, int4 and int8-qdq: the codes of a quantised model, or None to round the
            weights here.
        origin: further entries for the graph's metadata that say where it comes from.
        on_progress: called after every finished step.

    Returns:
        The content of export.json.

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
    plan, unfit = _plan(model, dtype, longest) if graph == "ort" else (None, None)
    graph = "neutral" if plan is None else "ort"
    traced = trace.trace(model, logits=logits, plan=plan)
    trace.simplify(traced, model)
    claims = {
        "pattern": claimed or "none",
        "dtype": dtype,
        "max_sequence": str(longest),
        "logits": logits,
        **({} if plan is None else {"graph": graph}),
        **(origin or {}),
    }
    traced.metadata_props.update({f"thanos_deploy.{key}": text for key, text in claims.items()})
    ir.save(traced, destination / GRAPH, external_data=GRAPH_DATA)
    del traced
    on_progress(2, _STEPS)
    _weights.require_names(destination / GRAPH, model)
    if _FLOATS[dtype] is not torch.float32:
        cast(model, torch.float32)
    rounding: dict[str, float] = {}
    ranges: dict[str, qdq.Ranges] = {}
    if dtype in GRIDS:
        names = checkpoint.linears
        if dtype == "int8-qdq":
            ranges = _observe(model, checkpoint)
            names = tuple(ranges)
        found = _codes(model, names, dtype, checkpoint, codes)
        if graph == "ort" and (head := _head(model)) is not None:
            found[head] = round_to(_matrix(model.get_submodule(head)).detach(), _HEAD)
        write = qdq.quantise if dtype == "int8-qdq" else nbits.write
        write(destination / GRAPH, {f"{name}.weight": one for name, one in found.items()})
        # A float16 graph dequantises to float16, so the values are rounded likewise.
        values = {name: one.weight.to(_FLOATS[dtype]) for name, one in found.items()}
        rounding = _rounded(destination / GRAPH, model, values, graph)
    weights = _weights.read(destination / GRAPH, model, checkpoint.linears, patterns)
    on_progress(3, _STEPS)
    limit = parity.LIMITS[dtype]
    cases = list(parity.compare(destination / GRAPH, model, limit, graph=graph))
    if dtype in ("int8", "int4"):
        nbits.use_integer_kernels(destination / GRAPH)
    if dtype == "int8-qdq":
        sparse = {name for name, its in patterns.items() if its == SemiStructured(2, 4)}
        qdq.quantise_activations(destination / GRAPH, ranges, results=sparse)
    if rounding:
        rounding["activations"] = _worst_logits(destination / GRAPH, model, graph)
    record = GraphRecord(
        opset=trace.OPSET,
        dtype=dtype,
        pattern=claimed,
        max_sequence=longest,
        logits=logits,
        graph=graph,
        neutral_because=unfit,
        cache=_cache_record(model, _FLOATS[dtype]),
        rounding=rounding,
        quantised=tuple(ranges) if dtype == "int8-qdq" else None,
        parity_limit=limit,
        parity=tuple(cases),
        weights=tuple(weights),
    )
    parity.require(destination / GRAPH, cases, limit)
    files.write_json(destination / GRAPH_RECORD, encode(record))
    on_progress(4, _STEPS)
    return record


def judge_file(
    path: Path, shapes: Mapping[str, tuple[int, int]], patterns: Mapping[str, Pattern]
) -> dict[str, Verdict]:
    """Judge whether the linear layers of an exported file hold their patterns.

    Args:
        path: the ONNX file.
        shapes: maps the name of a layer to its shape (outputs, inputs).
        patterns: maps the name of a layer to the pattern that it is claimed to hold.

    Returns:
        A verdict on each layer that has a pattern, by name.
    """
    onnxfile.require_own_data(path)
    initializers = _weights.initializers_of(path)
    return {
        name: judge(_weights.nonzero(initializers, f"{name}.weight", shapes[name][1])[2], pattern)
        for name, pattern in patterns.items()
    }


def _observe(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, qdq.Ranges]:
    """Activation ranges of the linear layers whose input can be rounded to int8, by full name."""
    ids = segments(
        builtin_text(),
        load_tokenizer(checkpoint.folder),
        count=_SEGMENTS,
        length=min(_TOKENS, checkpoint.max_positions),
        seed=0,
    )
    seen = qdq.observe(model, checkpoint.linears, ids)
    return {name: ranges for name, ranges in seen.items() if ranges.input.fits}


def _codes(
    model: PreTrainedModel,
    names: Sequence[str],
    dtype: str,
    checkpoint: Checkpoint,
    codes: Codes | None,
) -> dict[str, Quantised]:
    """Return the codes of linear layers, by full name.

    Raises:
        UsageError: the model was quantised to a grid that the dtype does not hold.
    """
    grid = GRIDS[dtype]
    if codes is None:
        return {name: round_to(matrix(model.get_submodule(name)).detach(), grid) for name in names}
    if dtype == "int8-qdq" and codes.grid != grid:
        raise UsageError(
            f"--dtype {dtype} with a model that was quantised to {codes.grid}: engines "
            "need int8 weights with one scale for each output",
            fix=f"prune again with --quantize {grid}; or use --dtype fp16",
        )
    if codes.grid.bits != grid.bits:
        raise UsageError(
            f"--dtype int{grid.bits} with a model that was quantised to {codes.grid}",
            fix=f"use --dtype int{codes.grid.bits}, which keeps the codes of the model; or "
            "fp32 or fp16",
        )
    return {name: codes.of(name, checkpoint.linear(name)) for name in names}


def _rounded(
    path: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], graph: str
) -> dict[str, float]:
    """Replace weights of the model by the rounded ones that the file has.

    Returns:
        "weights": largest difference of the logits that the rounding makes, relative to their
            range.
    """
    moved = _worst_logits(path, model, graph)
    for name, weight in weights.items():
        _matrix(model.get_submodule(name)).data.copy_(weight)
    return {"weights": moved}


def _head(model: PreTrainedModel) -> str | None:
    """Name of the module that owns the output head's weight; with tied weights, the embedding.

    It is worth quantising: once the blocks have few bits, it is the largest weight that a token
    reads. None for a tied weight whose rows do not divide into whole groups.
    """
    output: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = output.weight is model.get_input_embeddings().weight
    cols = output.weight.shape[1]
    if tied and cols % _HEAD.width(cols):
        return None  # rows of an embedding are looked up in whole groups only
    names = {id(weight): name for name, weight in model.named_parameters()}
    return names[id(output.weight)].removesuffix(".weight")


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a module, [out, in]; for an embedding [tokens, in]."""
    return module.weight if isinstance(module, nn.Embedding) else matrix(module)


def _worst_logits(path: Path, model: PreTrainedModel, graph: str) -> float:
    cases = parity.compare(path, model, float("inf"), graph=graph)
    return max(case.logits_error for case in cases)


def _plan(
    model: PreTrainedModel, dtype: str, longest: int
) -> tuple[attention.Plan | None, str | None]:
    """The plan for ONNX Runtime's attention, or None and the reason why it cannot be used."""
    if _FLOATS[dtype] is not torch.float32:
        return None, f"{dtype} is for GPUs, and ONNX Runtime's attention is used on CPUs"
    try:
        return attention.plan(model, longest), None
    except attention.UnfitError as error:
        return None, str(error)


def _longest(checkpoint: Checkpoint, asked: int | None) -> int:
    """The most tokens, prompt and answer together, that the graph is meant for."""
    if asked is not None and not 1 <= asked <= checkpoint.max_positions:
        raise UsageError(
            f"--max-seq {asked}: the model takes 1 to {checkpoint.max_positions} tokens",
            fix="give a number in that range, or leave --max-seq out",
        )
    return asked or checkpoint.max_positions


def _cache_record(model: PreTrainedModel, dtype: torch.dtype) -> CacheRecord:
    """Shapes and bytes of the KV cache, taken from a cache that the model itself makes."""
    tensors = trace.empty_cache(model, 1, 1)
    return CacheRecord(
        blocks=tuple(
            CacheBlock(keys.shape[1], keys.shape[3], values.shape[3])
            for keys, values in zip(tensors[::2], tensors[1::2], strict=True)
        ),
        bytes_per_token=sum(tensor.numel() for tensor in tensors) * dtype.itemsize,
    )
