"""The results, as JSON."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from thanos_deploy.bundle import files
from thanos_deploy.machine.environment import Environment
from thanos_deploy.machine.stillness import Stillness
from thanos_deploy.measure.run import DENSE, Interval
from thanos_deploy.measure.statistics import Drift

FORMAT: Final = "thanos-deploy/comparison/1"

PATH = Path(__file__).parents[1] / "results" / "comparison.json"

Runtime = Literal["ONNX Runtime", "llama.cpp", "OpenVINO", "ORT-GenAI"]

# What a graph and a GGUF file call types of so many bits.
Bits = Literal["fp32", "int8", "int4", "f32", "q8_0", "q4_0"]

# How the weights came to these bits: they had them; each was rounded; or errors were compensated
# for, by `prune --quantize`.
Way = Literal["exact", "rounded", "compensated"]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one thing that a model was timed at.

    Attributes:
        median: of the rounds.
        ratio: to the baseline's median, with its interval; None for the baseline.
        drift: from the first rounds to the last; None where there were fewer than 6.
        samples: one a round; none where they were not kept.
    """

    median: float
    ratio: Interval | None = None
    drift: Drift | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model in one runtime.

    Attributes:
        model: "dense", or the pattern that it was pruned to.
        bits: of most weights.
        way: how they came to these bits.
        runtime: "ONNX Runtime" is this project's own way to run it.
        bytes: of the files that it reads.
        perplexity: see `Conditions.judge`.
        prefill: of the whole prompt.
        decode: of one token after it.
    """

    model: str
    bits: Bits
    way: Way
    runtime: Runtime
    bytes: int
    perplexity: float
    prefill: Times
    decode: Times

    @property
    def pruned(self) -> bool:
        """It is not the dense model."""
        return self.model != DENSE

    @property
    def weights(self) -> str:
        """The model and its weights; rounding, the usual way, is not said."""
        return f"{self.model} {self.bits}{' compensated' if self.way == 'compensated' else ''}"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.weights} on {self.runtime}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all rows have in common.

    Attributes:
        model, model_sha256: name and hash of the dense model.
        text: what perplexities are of.
        segments, length: how many segments of it, and tokens of each.
        judge: what computed them.
        prompt, new_tokens: tokens that are read, and written one by one.
        rounds: that count.
        threads: that computed.
        command: that measured.
        date: of that.
    """

    model: str
    model_sha256: str
    text: str
    segments: int
    length: int
    judge: str
    prompt: int
    new_tokens: int
    rounds: int
    threads: int
    command: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run.

    Attributes:
        format: of this record.
        status: whether its times count.
        reasons: why they do not.
        conditions: under which they were measured.
        environment: what they were measured on.
        machine: whether that held still.
        rows: the baseline first, which is the dense model in fp32.
    """

    format: Literal["thanos-deploy/comparison/1"] = FORMAT
    status: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...] = ()
    conditions: Conditions
    environment: Environment
    machine: Stillness | None = None
    rows: tuple[Row, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse rows that cannot be told apart, and a run without a baseline.

        Raises:
            ValueError: there are such, or there is none.
        """
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"two rows are called alike: {', '.join(names)}")
        if not names or self.rows[0].pruned or self.rows[0].decode.ratio is not None:
            raise ValueError("the first row is not the dense model that ratios are to")


def read(path: Path = PATH) -> Comparison:
    """The results in a file.

    Raises:
        InputError: it holds something else.
    """
    return files.read_record(path, Comparison)
