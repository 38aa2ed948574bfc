"""What a user may ask of an export: one frozen dataclass for each kind of target.

Every field has a default and a `Flag`, so that the command line offers it and a report prints it,
for every target that takes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from thanos_deploy.bundle.codec import LATER, Json
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage

_FLAG = "thanos_deploy.flag"

Dtype = Literal["fp32", "fp16", "int8", "int8-qdq"]
Logits = Literal["all", "last"]
Form = Literal["matmul", "conv1x1", "auto"]
Compatibility = Literal["none", "version", "same-sm", "ampere+"]


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is written on the command line.

    Attributes:
        name: with its dashes.
        help: a line or two of --help, the default included.
        prefix: what each value of a list of numbers has before it everywhere else: "sm" for
            `--sm 80,86`, which means ("sm80", "sm86"). None for values that are written as they
            are.
    """

    name: str
    help: str
    prefix: str | None = None

    @property
    def keyword(self) -> str:
        """The name as an identifier: `max_seq` for `--max-seq`."""
        return self.name.removeprefix("--").replace("-", "_")


def flagged(flag: Flag) -> Mapping[str, object]:
    """Metadata of a dataclass's field that the command line offers under this flag."""
    return {_FLAG: flag}


def flags(options: type[Any]) -> dict[str, Flag]:
    """By name of a field, its flag; of fields without one nothing."""
    return {each.name: each.metadata[_FLAG] for each in fields(options) if _FLAG in each.metadata}


_DTYPE = Flag(
    "--dtype",
    "dtype of the graph. int8 rounds the weights of the blocks, for ONNX Runtime only; int8-qdq "
    "rounds weights and activations of the blocks, for engines only, with ranges measured on the "
    "built-in text.  [default: that of the existing graph, or fp32; engines: fp16]",
)
_MAX_SEQUENCE = Flag(
    "--max-seq",
    "Longest sequence, prompt and answer together, that is promised to work.  [default: that of "
    "the existing graph, or the model's longest]",
)
_LOGITS = Flag(
    "--logits",
    "last: compute the logits after the last token only, which saves work in prefill and is all "
    "that generating text needs. all: compute them after every token, which `eval --runtime onnx` "
    "needs.  [default: those of the existing graph, or all; engines: last]",
)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """For a target that leaves nothing to choose."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the graph holds its weights in, how long a text it is meant for, and what it gives.

    Attributes:
        dtype: see `exporters.onnx.graph.export`.
        max_sequence: prompt and answer together; None for all that the model takes.
        logits: "all", after every token, or "last".
    """

    dtype: Dtype = field(default="fp32", metadata=flagged(_DTYPE))
    max_sequence: int | None = field(default=None, metadata=flagged(_MAX_SEQUENCE))
    # Graphs were made with all logits before there was a choice.
    logits: Logits = field(default="all", metadata={**LATER, **flagged(_LOGITS)})


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a TensorRT engine is built for.

    Attributes:
        dtype: of the graph that it is built from: "fp16", "fp32" or "int8-qdq".
        max_sequence: the most tokens, prompt and answer together; None for what the graph of the
            bundle is meant for.
        logits: of that graph: "last", which is all that generating text needs, or "all".
        batch, prompt: the usual number of sequences and of prompt tokens, and the largest; see
            `exporters.tensorrt.engine.export` for None.
        form: "matmul", "conv1x1" (see `exporters.tensorrt.conv1x1`), or "auto", the faster one.
        compatibility: where else the engine may run.
        architectures: the GPUs to build for, such as "sm80"; empty for the default of the target.
    """

    dtype: Dtype = field(default="fp16", metadata=flagged(_DTYPE))
    max_sequence: int | None = field(default=None, metadata=flagged(_MAX_SEQUENCE))
    logits: Logits = field(default="last", metadata=flagged(_LOGITS))
    batch: tuple[int, ...] = field(
        default=(1, 8),
        metadata=flagged(Flag("--batch", "The usual and the largest batch size.  [default: 1,8]")),
    )
    prompt: tuple[int, ...] | None = field(
        default=None,
        metadata=flagged(
            Flag(
                "--seq",
                "The usual and the largest length of a prompt in tokens.  [default: 128,1024, or "
                "the model's longest]",
            )
        ),
    )
    form: Form = field(
        default="matmul",
        metadata=flagged(
            Flag(
                "--sparse-form",
                "Form of the linear layers; auto builds both forms on the GPU and keeps the faster "
                "one.  [default: matmul]",
            )
        ),
    )
    compatibility: Compatibility = field(
        default="none",
        metadata=flagged(
            Flag(
                "--engine-compat",
                "Let the engine run on other GPUs or versions than those it is built for, at a "
                "cost in speed.  [default: none]",
            )
        ),
    )
    architectures: tuple[str, ...] = field(
        default=(),
        metadata=flagged(
            Flag(
                "--sm",
                "Compute capabilities to build for.  [default: the GPU of this machine, or all "
                "that the library builds for ahead of time]",
                prefix="sm",
            )
        ),
    )


GRAPHS: Stage[ExportRequest, Json, GraphResult] = Stage(ONNX, ExportRequest, dict, GraphResult)


def exported_with(bundle: Bundle) -> ExportRequest:
    """What the graph of a bundle was made with; the defaults if there is none."""
    return bundle.options(GRAPHS) if ONNX in bundle.stages else ExportRequest()
