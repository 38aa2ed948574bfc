"""The records of an exported ONNX graph: export.json, and the result of its stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thanos_deploy.bundle.codec import decode, loads
from thanos_deploy.errors import InputError


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One comparison of ONNX Runtime with PyTorch; errors are relative to the range of the values.

    Attributes:
        name: what the case tests.
        batch, past, sequence: batch size, tokens in the KV cache, and new tokens.
        logits_error, cache_error: largest absolute difference, divided by max - min of PyTorch's
            values, at positions that are not padding.
        first_differing: the first output, in the order in which the network computes them, whose
            error exceeds the limit; None if no error does.
    """

    name: str
    batch: int
    past: int
    sequence: int
    logits_error: float
    cache_error: float
    first_differing: str | None = None


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """The weight of a linear layer in the written file.

    Attributes:
        name: the layer's full name in the model.
        shape: shape of the weight in the file.
        input_axis: the axis of the inputs, which is summed over and along which n:m groups run.
        sparsity: fraction of zeros.
        pattern: the pattern that the weight should have; None for a dense layer.
        pattern_holds: whether the pattern holds everywhere; None for a dense layer.
    """

    name: str
    shape: tuple[int, ...]
    input_axis: int
    sparsity: float
    pattern: str | None
    pattern_holds: bool | None


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """The KV cache of one block for each token: heads, and the lengths of a key and of a value."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """The KV cache of a graph: each block, and the bytes for each token in all blocks together."""

    blocks: tuple[CacheBlock, ...]
    bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """The content of export.json.

    Attributes:
        opset: version of the ONNX opset.
        dtype: dtype of the weights; see `exporters.options.ExportRequest`.
        pattern: the patterns that the linear layers should have, in words; None without any.
        max_sequence: the maximum sequence length of the graph in tokens, prompt and answer
            together.
        logits: "all" or "last"; see `exporters.onnx.graph`.
        graph: "neutral", or "ort" with operators that only ONNX Runtime has; see
            `exporters.onnx.graph`.
        neutral_because: why the graph is neutral although "ort" was requested; None if the graph
            is what was requested.
        cache: the KV cache.
        rounding: how far quantisation moves the logits, relative to their range, by its cause:
            "weights", "activations".
        quantised: names of the layers whose activations are int8 as well; None if the dtype has no
            such layers.
        parity_limit: the largest error that is accepted.
        parity: the comparisons with PyTorch.
        weights: the weights of the linear layers as they are stored in the file.
    """

    opset: int
    dtype: str
    pattern: str | None
    max_sequence: int
    # The fields with defaults are missing in older records, and the defaults describe those graphs.
    logits: str = "all"
    graph: str = "neutral"
    neutral_because: str | None = None
    cache: CacheRecord
    rounding: Mapping[str, float] = field(default_factory=dict)
    quantised: tuple[str, ...] | None = None
    parity_limit: float
    parity: tuple[ParityCase, ...]
    weights: tuple[WeightRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphResult:
    """The summary of a graph's record for the manifest; for other attributes see `GraphRecord`.

    Attributes:
        cache_bytes_per_token: `GraphRecord.cache.bytes_per_token`.
        weights: number of linear layers.
    """

    max_sequence: int
    logits: str = "all"
    graph: str = "neutral"
    neutral_because: str | None = None
    cache_bytes_per_token: int
    rounding: Mapping[str, float] = field(default_factory=dict)
    parity_limit: float
    parity: tuple[ParityCase, ...]
    weights: int

    @classmethod
    def of(cls, record: GraphRecord) -> "GraphResult":
        """Summarise a record."""
        return cls(
            max_sequence=record.max_sequence,
            cache_bytes_per_token=record.cache.bytes_per_token,
            parity_limit=record.parity_limit,
            parity=record.parity,
            weights=len(record.weights),
            logits=record.logits,
            graph=record.graph,
            neutral_because=record.neutral_because,
            rounding=record.rounding,
        )

    @property
    def worst_logits_error(self) -> float:
        """The largest error of the logits in all comparisons."""
        return max(case.logits_error for case in self.parity)


def read_graph_record(path: Path) -> GraphRecord:
    """Read an export.json.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        content = loads(path.read_bytes())
        for weight in content["weights"]:
            # In older records, one pattern stands for all weights.
            weight.setdefault("pattern", content["pattern"])
        return decode(GraphRecord, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not readable ({error})", fix="export again with --target onnx --overwrite"
        ) from error
