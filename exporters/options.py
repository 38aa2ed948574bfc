"""What a user asks of an export."""

from dataclasses import asdict, dataclass

from thanos_deploy.bundle.files import Json


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the graph holds its weights in, how long a text it is meant for, and what it gives.

    Attributes:
        dtype: "fp32", "fp16" or "int8"; see `exporters.onnx.graph.export`.
        max_sequence: prompt and answer together; None for all that the model takes.
        logits: "all", after every token, or "last".
    """

    dtype: str = "fp32"
    max_sequence: int | None = None
    logits: str = "all"

    def to_json(self) -> Json:
        """For the manifest; graphs were made with all logits before there was a choice."""
        chosen = asdict(self)
        if self.logits == "all":
            del chosen["logits"]
        return chosen


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
        compatibility: one of `exporters.tensorrt.engine.COMPATIBILITY`.
        architectures: the GPUs to build for; empty for the one of this machine (tensorrt) or all
            that the library knows (tensorrt-rtx).
    """

    dtype: str = "fp16"
    max_sequence: int | None = None
    logits: str = "last"
    batch: tuple[int, ...] = (1, 8)
    prompt: tuple[int, ...] | None = None
    form: str = "matmul"
    compatibility: str = "none"
    architectures: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """For the manifest."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
