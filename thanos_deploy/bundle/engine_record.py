"""The records of a TensorRT engine: build.json beside it, and the result of its stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from thanos_deploy.bundle.codec import decode_format, loads
from thanos_deploy.bundle.layout import BUILD, BUILD_FORMAT
from thanos_deploy.errors import InputError

Choice = Literal["picked", "eligible", "not eligible", "not reported"]


@dataclass(frozen=True, slots=True)
class Span:
    """The range of a dynamic dimension: its smallest, usual and largest size."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimisation profile for the graph of `exporters.onnx`.

    Attributes:
        name: "prefill" or "decode".
        batch: batch sizes.
        sequence: numbers of new tokens in each sequence.
        past: numbers of tokens in the KV cache.
        longest: maximum length of a sequence, cached and new tokens together.
    """

    name: str
    batch: Span
    sequence: Span
    past: Span
    longest: int


@dataclass(frozen=True, slots=True)
class LayerProof:
    """The verdict on one linear layer of an engine: whether a sparse kernel runs it.

    Attributes:
        name: name of the layer in the model.
        shape: number of outputs, number of inputs.
        pattern_holds: whether the weight in the graph is 2:4.
        verdict: "picked": a sparse kernel runs the layer. "eligible": a sparse kernel was possible,
            but a dense kernel was chosen. "not eligible": no sparse kernel is possible. "not
            reported": it is unknown which kernel runs the layer.
        reason: reason for the verdict, in one line.
        engine_layer: name and kind of the engine's layer that computes this layer; empty if
            unknown.
    """

    name: str
    shape: tuple[int, int]
    pattern_holds: bool
    verdict: Choice
    reason: str
    engine_layer: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Number of linear layers: all, those that are 2:4, could run sparse, and do run sparse."""

    layers: int
    pattern_holds: int
    eligible: int
    picked: int

    @classmethod
    def of(cls, layers: Sequence[LayerProof]) -> "Summary":
        """Count the verdicts; layers that were picked count as eligible too."""
        verdicts = [layer.verdict for layer in layers]
        picked = verdicts.count("picked")
        return cls(
            layers=len(layers),
            pattern_holds=sum(layer.pattern_holds for layer in layers),
            eligible=verdicts.count("eligible") + picked,
            picked=picked,
        )

    def __str__(self) -> str:
        return (
            f"{self.picked} picked, {self.eligible} eligible, {self.pattern_holds} hold 2:4, of "
            f"{self.layers} layers"
        )


@dataclass(frozen=True, slots=True)
class Built:
    """The fields that both records of an engine have.

    Attributes:
        format: format of build.json.
        target: name of the target.
        library: version of the library that built the engine.
        arch: GPU architectures that the engine was built for, such as "sm90".
        dtype: dtype of the graph.
        sparse_weights: whether the builder was allowed to use sparse kernels.
        sparse_form: form of the linear layers; see `exporters.options.EngineRequest`.
        compatibility: where else the engine may run; see `exporters.options.EngineRequest`.
        max_sequence: maximum sequence length in tokens, prompt and answer together.
        seconds: duration of the build.
        peak_memory_bytes: peak host memory of the builder.
        engine_bytes: size of the engine file.
        network_layers: number of layers of the graph as the library parsed it.
        engine_layers: number of layers of the finished engine; 0 if they were not listed.
        summary: counts of the verdicts.
    """

    format: str
    target: str
    library: str
    arch: tuple[str, ...]
    dtype: str
    sparse_weights: bool
    sparse_form: str
    compatibility: str
    max_sequence: int
    seconds: float
    peak_memory_bytes: int
    engine_bytes: int
    network_layers: int
    engine_layers: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class EngineResult(Built):
    """The result of an engine's stage, for the manifest.

    Attributes:
        trial_seconds: time from the prompt to the last token, for each form of the linear layers;
            empty if only one form was built.
    """

    trial_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuildRecord(Built):
    """The content of build.json.

    Attributes:
        profiles: the optimisation profiles for prefill and for decode.
        layers: the verdict on every linear layer.
    """

    profiles: tuple[Profile, ...]
    layers: tuple[LayerProof, ...]

    def result(self, trial_seconds: Mapping[str, float]) -> EngineResult:
        """Return the result of the stage, without the profiles and the layers."""
        shared = {each.name: getattr(self, each.name) for each in fields(Built)}
        return EngineResult(**shared, trial_seconds=trial_seconds)


def read_build(folder: Path) -> BuildRecord:
    """Read the build.json in the folder of an engine.

    Raises:
        InputError: the file is missing or unreadable.
    """
    path = folder / BUILD
    try:
        return decode_format(BuildRecord, loads(path.read_bytes()), BUILD_FORMAT)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable record of a build ({type(error).__name__}: {error})",
            fix="build the engine again with --overwrite",
        ) from error
