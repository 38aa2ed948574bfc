"""What is recorded of a TensorRT engine: build.json beside it, and the result of its stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from thanos_deploy.bundle.codec import decode, loads
from thanos_deploy.bundle.layout import BUILD, BUILD_FORMAT
from thanos_deploy.errors import InputError

Choice = Literal["picked", "eligible", "not eligible", "not reported"]


@dataclass(frozen=True, slots=True)
class Span:
    """A size that varies: its least, usual and largest value."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to run the graph of `exporters.onnx`.

    Attributes:
        name: "prefill" or "decode".
        batch: sequences at once.
        sequence: tokens that are read.
        past: tokens that are cached.
        longest: the most tokens of a sequence, cached and read together.
    """

    name: str
    batch: Span
    sequence: Span
    past: Span
    longest: int


@dataclass(frozen=True, slots=True)
class LayerProof:
    """The verdict on one linear layer.

    Attributes:
        name: in the model.
        shape: outputs and inputs.
        pattern_holds: 2:4 holds in the graph.
        verdict: "picked": a sparse kernel runs it. "eligible": one was possible and a dense one was
            chosen. "not eligible": none is possible. "not reported": nobody says.
        reason: in one line.
        engine_layer: the layer of the engine that does its work, with the kind; empty if unknown.
    """

    name: str
    shape: tuple[int, int]
    pattern_holds: bool
    verdict: Choice
    reason: str
    engine_layer: str


@dataclass(frozen=True, slots=True)
class Summary:
    """How many linear layers there are, hold 2:4, could run sparse, and do run sparse."""

    layers: int
    pattern_holds: int
    eligible: int
    picked: int

    @classmethod
    def of(cls, layers: Sequence[LayerProof]) -> "Summary":
        """Count the verdicts; what was picked was eligible too."""
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
    """What both records of an engine have.

    Attributes:
        format: of build.json.
        target: the name of the target.
        library: version of the library that built it.
        arch: the GPUs that it was built for, such as "sm90".
        dtype: of the graph.
        sparse_weights: the builder was allowed to use sparse kernels.
        sparse_form: how the linear layers are written; see `exporters.options.EngineRequest`.
        compatibility: likewise.
        max_sequence: the most tokens, prompt and answer together.
        seconds: of the build.
        peak_memory_bytes: of the builder on the host.
        engine_bytes: of the file.
        network_layers: layers of the graph as the library read it.
        engine_layers: layers of the finished engine; 0 where nobody listed them.
        summary: the verdicts, counted.
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
    """What the manifest has of an engine.

    Attributes:
        trial_seconds: by form, the time from prompt to last token; empty where one form was built.
    """

    trial_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuildRecord(Built):
    """The content of build.json.

    Attributes:
        profiles: for prefill and for decode.
        layers: the verdict on every linear layer.
    """

    profiles: tuple[Profile, ...]
    layers: tuple[LayerProof, ...]

    def result(self, trial_seconds: Mapping[str, float]) -> EngineResult:
        """The short form for the manifest."""
        shared = {each.name: getattr(self, each.name) for each in fields(Built)}
        return EngineResult(**shared, trial_seconds=trial_seconds)


def read_build(folder: Path) -> BuildRecord:
    """The content of build.json.

    Raises:
        InputError: it is missing or not readable.
    """
    path = folder / BUILD
    try:
        content = loads(path.read_bytes())
        if content["format"] != BUILD_FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return decode(BuildRecord, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a readable record of a build ({type(error).__name__}: {error})",
            fix="build the engine again with --overwrite",
        ) from error
