"""What is recorded of an exported ONNX graph: export.json, and the result of its stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thanos_deploy.bundle.codec import decode, loads
from thanos_deploy.errors import InputError


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
    first_differing: str | None = None


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
class CacheBlock:
    """What one block keeps for each token: heads, and the length of a key and of a value."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """The kv cache of a graph: each block, and the bytes for each token in all of them."""

    blocks: tuple[CacheBlock, ...]
    bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """The content of export.json.

    Attributes:
        opset: of ONNX.
        dtype: of the weights; see `exporters.options.ExportRequest`.
        pattern: what the linear layers are claimed to hold, in words; None for nothing.
        max_sequence: the most tokens, prompt and answer together, that the graph is meant for.
        logits: "all" or "last".
        graph: "neutral", or "ort" with operators of ONNX Runtime alone; see `exporters.onnx.graph`.
        neutral_because: why it is neutral though "ort" was asked for; None if it was not.
        cache: the kv cache.
        rounding: how far int8 moves the logits, relative to their range: "weights", "activations".
        quantised: names of the layers whose activations are int8 too; None where none can be.
        parity_limit: the largest error that is accepted.
        parity: the comparisons with PyTorch.
        weights: the linear layers as they lie in the file.
    """

    opset: int
    dtype: str
    pattern: str | None
    max_sequence: int
    logits: str = "all"  # the first graphs have all and do not say so; likewise what has a default
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
    """What the manifest has of an exported graph; for the attributes see `GraphRecord`.

    Attributes:
        cache_bytes_per_token: `GraphRecord.cache.bytes_per_token`.
        weights: how many linear layers there are.
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
        """The short form of a record."""
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
        """The largest error of the logits in any comparison."""
        return max(case.logits_error for case in self.parity)


def read_graph_record(path: Path) -> GraphRecord:
    """The content of an export.json.

    Raises:
        InputError: it is missing or not readable.
    """
    try:
        content = loads(path.read_bytes())
        for weight in content["weights"]:
            # Weights had no pattern of their own while all had the same.
            weight.setdefault("pattern", content["pattern"])
        return decode(GraphRecord, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not readable ({error})", fix="export again with --target onnx --overwrite"
        ) from error
