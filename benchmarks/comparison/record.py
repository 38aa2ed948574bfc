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

# Names of the weight types, in graphs and in GGUF files.
Bits = Literal["fp32", "int8", "int4", "f32", "q8_0", "q4_0"]

# How the weights got this type: unchanged, each rounded by itself, or quantised with error
# compensation by `prune --quantize`.
Way = Literal["exact", "rounded", "compensated"]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the prefill, or of the decode, of one model.

    Attributes:
        median: median over the rounds.
        ratio: ratio to the baseline's median, with its confidence interval; None for the baseline.
        drift: change from the first third of the rounds to the last; None for fewer than 6 rounds.
        samples: one sample per round; empty if they were not kept.
    """

    median: float
    ratio: Interval | None = None
    drift: Drift | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model in one runtime.

    Attributes:
        model: "dense", or the pattern that the model was pruned to.
        bits: type of most weights.
        way: how the weights got this type.
        runtime: the runtime; "ONNX Runtime" stands for this project's own runtime, which uses it.
        bytes: total size of the files that the runtime reads.
        perplexity: see `Conditions.judge`.
        prefill: times of the whole prompt.
        decode: times of one token after the prompt.
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
        """Whether the model is pruned."""
        return self.model != DENSE

    @property
    def weights(self) -> str:
        """The model and the type of its weights; rounding, the usual way, is not mentioned."""
        return f"{self.model} {self.bits}{' compensated' if self.way == 'compensated' else ''}"

    @property
    def name(self) -> str:
        """The name of the row, different from all others."""
        return f"{self.weights} on {self.runtime}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions that all rows share.

    Attributes:
        model, model_sha256: name and hash of the dense model.
        text: the text on which perplexities are computed.
        segments, length: number of its segments, and of tokens in each.
        judge: what computed the perplexities.
        prompt, new_tokens: number of tokens in the prompt, and of tokens generated after it.
        rounds: number of rounds that count.
        threads: number of threads that computed.
        command: command that measured.
        date: date of the run.
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
    """The results of a run.

    Attributes:
        format: format and version of this record.
        status: whether the times count.
        reasons: why the times do not count.
        conditions: conditions of the measurement.
        environment: machine and software of the measurement.
        machine: how undisturbed the machine was.
        rows: the rows; the baseline, which is the dense model in fp32, comes first.
    """

    format: Literal["thanos-deploy/comparison/1"] = FORMAT
    status: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...] = ()
    conditions: Conditions
    environment: Environment
    machine: Stillness | None = None
    rows: tuple[Row, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse rows of equal name, and a run without a baseline.

        Raises:
            ValueError: two rows have the same name, or the first row is not the baseline.
        """
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"two rows are called alike: {', '.join(names)}")
        if not names or self.rows[0].pruned or self.rows[0].decode.ratio is not None:
            raise ValueError("the first row is not the dense model that ratios are to")


def read(path: Path = PATH) -> Comparison:
    """Read the results from a file.

    Raises:
        InputError: the file holds something else.
    """
    return files.read_record(path, Comparison)
