"""Options of an export: one frozen dataclass for each kind of target.

Every field is made by `option`, so the command line offers it and a report prints it for every
target that has it.
"""

from dataclasses import dataclass
from typing import Literal

from thanos_deploy.bundle.codec import Json
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage
from thanos_deploy.option import option

Dtype = Literal["fp32", "fp16", "int8", "int4", "int8-qdq"]
Logits = Literal["all", "last"]
Graph = Literal["neutral", "ort"]
Form = Literal["matmul", "conv1x1", "auto"]
Compatibility = Literal["none", "version", "same-sm", "ampere+"]


DTYPE = (
    "dtype of the graph. int8 and int4, for ONNX Runtime only, store the weights of the "
    "blocks in 8 or 4 bits: the codes of `prune --quantize` if the model has them, else "
    "rounded weights. int8-qdq does the same in 8 bits for engines, and also quantises "
    "the activations of the blocks, with ranges measured on the built-in text. q8_0, "
    "q4_k_m, q4_0 and q4_1 are llama.cpp's types, for GGUF only.  [default: that of the "
    "existing graph, or fp32; engines: fp16; gguf: the type that keeps the codes of "
    "`prune --quantize`, or q8_0]"
)
_MAX_SEQUENCE = (
    "Longest sequence that the export supports, prompt and answer together.  [default: "
    "that of the existing graph, or the model's longest]"
)
_LOGITS = (
    "last: compute the logits after the last token only, which saves work in prefill and is all "
    "that generating text needs. all: compute them after every token, which `eval --runtime onnx` "
    "needs.  [default: those of the existing graph, or all; engines: last]"
)
_GRAPH = (
    "ort: uses ONNX Runtime's own attention operator, which updates the KV cache in "
    "place; for the CPU, in fp32, int8 and int4. If the operator does not fit the model, "
    "the graph is neutral, and the reason is printed. neutral: uses only operators that "
    "every runtime has; for GPUs.  [default: that of the existing graph, or ort]"
)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a target that has none."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Options of an ONNX graph.

    Attributes:
        dtype: dtype of the weights; see `exporters.onnx.graph.export`.
        max_sequence: the most tokens, prompt and answer together; None for all that the model
            takes.
        logits: "all" for logits after every token, or "last" for the last token only.
        graph: "neutral", or "ort" where that fits the model; see `exporters.onnx.graph.export`.
    """

    dtype: Dtype = option("fp32", "--dtype", DTYPE)
    max_sequence: int | None = option(None, "--max-seq", _MAX_SEQUENCE)
    # Older bundles do not record it: their graphs have all logits.
    logits: Logits = option("all", "--logits", _LOGITS, later=True)
    # Likewise: graphs of older bundles are neutral.
    graph: Graph = option("neutral", "--graph", _GRAPH, later=True)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Options of a TensorRT engine.

    Attributes:
        dtype: dtype of the graph that the engine is built from: "fp16", "fp32" or "int8-qdq".
        max_sequence: the most tokens, prompt and answer together; None for the limit of the
            bundle's graph.
        logits: logits of that graph: "last", which is all that generating text needs, or "all".
        batch, prompt: the usual and the largest number of sequences, and of prompt tokens; see
            `exporters.tensorrt.engine.export` for None.
        form: "matmul", "conv1x1" (see `exporters.tensorrt.conv1x1`), or "auto" for the faster form.
        compatibility: the other GPUs or versions of TensorRT that may run the engine.
        architectures: the GPUs to build for, such as "sm80"; empty for the default of the target.
    """

    dtype: Dtype = option("fp16", "--dtype", DTYPE)
    max_sequence: int | None = option(None, "--max-seq", _MAX_SEQUENCE)
    logits: Logits = option("last", "--logits", _LOGITS)
    batch: tuple[int, ...] = option(
        (1, 8), "--batch", "The usual and the largest batch size.  [default: 1,8]"
    )
    prompt: tuple[int, ...] | None = option(
        None,
        "--seq",
        "The usual and the largest length of a prompt in tokens.  [default: 128,1024, or "
        "the model's longest]",
    )
    form: Form = option(
        "matmul",
        "--sparse-form",
        "Form of the linear layers; auto builds both forms on the GPU and keeps the faster "
        "one.  [default: matmul]",
    )
    compatibility: Compatibility = option(
        "none",
        "--engine-compat",
        "Let the engine run on other GPUs or versions than those it is built for, at a "
        "cost in speed.  [default: none]",
    )
    architectures: tuple[str, ...] = option(
        (),
        "--sm",
        "Compute capabilities to build for.  [default: the GPU of this machine, or all "
        "that the library builds for ahead of time]",
        prefix="sm",
    )


GRAPHS: Stage[ExportRequest, Json, GraphResult] = Stage(ONNX, ExportRequest, dict, GraphResult)


def exported_with(bundle: Bundle) -> ExportRequest:
    """Return the options of the bundle's graph; if it has none, the defaults with graph "ort"."""
    return bundle.options(GRAPHS) if ONNX in bundle.stages else ExportRequest(graph="ort")


def neutral_like(bundle: Bundle) -> ExportRequest:
    """Return the options of the bundle's graph; if it has none, the defaults of a neutral graph."""
    return bundle.options(GRAPHS) if ONNX in bundle.stages else ExportRequest()
