"""What an evaluation leaves in a bundle: perplexity on a text, or scores in tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import LATER
from thanos_deploy.bundle.record import Stage
from thanos_deploy.calibration.frame import NO_FRAME, Frame
from thanos_deploy.measure.options import EvalRequest, TaskRequest
from thanos_deploy.measure.run import Interval

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Answers:
    """How many questions of a kind a model answers right.

    Attributes:
        questions: how many there are.
        accuracy: the share of right answers; see `proportion.share`.
        change: of that share from the dense model's; see `proportion.change`. None for a model by
            itself.
    """

    questions: int
    accuracy: Interval
    change: Interval | None = None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a model is from the dense one; see `measure.fidelity`.

    Attributes:
        divergence: nats per token of the text; None where the dense model makes its logits in a
            way that is not known (see `has_plain_head`).
        agreement: share of its positions at which both have the same likeliest token.
        texts: that the dense model wrote.
        tokens: of each.
        continued: how many of these the model would have written after those before, on average.
        before_first: how many before the first that differs, on average.
    """

    divergence: float | None
    agreement: float
    texts: int
    tokens: int
    continued: float
    before_first: float


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Quality on a text.

    Attributes:
        text: name of the text.
        value: the perplexity.
        segments: number of segments.
        length: tokens in each segment.
        frame: special tokens that each segment begins with; none in records of versions that
            recorded none.
        words, choices: answers about the text, see `measure.cloze` and `measure.choices`; None if
            there were no questions, or none were asked.
        fidelity: comparison with the dense model; None for a model by itself.
    """

    text: str
    value: float
    segments: int
    length: int
    frame: Frame = NO_FRAME
    words: Answers | None = field(default=None, metadata=LATER)
    choices: Answers | None = field(default=None, metadata=LATER)
    fidelity: Fidelity | None = field(default=None, metadata=LATER)

    @property
    def named(self) -> dict[str, float]:
        """The values that gates can use, by name; see `gates.QUALITIES`."""
        found = {"ppl": self.value}
        for name, asked in (("words", self.words), ("choices", self.choices)):
            if asked is not None:
                found[name] = asked.accuracy.estimate
        if self.fidelity is not None:
            found["agreement"] = self.fidelity.agreement
            if self.fidelity.divergence is not None:
                found["kl"] = self.fidelity.divergence
        return found


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a model in one task by one metric.

    Attributes:
        task, metric: as the library calls them.
        value: in the metric's own unit.
        stderr: the library's estimate; None if it has none.
        samples: how many examples.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class TaskQuality:
    """Scores on tasks of lm-evaluation-harness."""

    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInputs:
    """What an evaluation on a text read.

    Attributes:
        model: hash of the pruned model; None for a dense one.
        dense: what was measured of the dense model; None for itself.
        text: hash of the text.
        frame: ids that segments begin with.
        onnx: hashes of the files of the graph that was run; empty for PyTorch.
    """

    model: str | None = field(default=None, metadata=LATER)
    dense: TextQuality | None = field(default=None, metadata=LATER)
    text: str
    frame: tuple[int, ...] = field(default=(), metadata=LATER)
    onnx: Mapping[str, str] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """What an evaluation in tasks read; see `TextInputs`.

    Attributes:
        tasks: hashes of the files of tasks.
    """

    model: str | None = field(default=None, metadata=LATER)
    dense: TaskQuality | None = field(default=None, metadata=LATER)
    tasks: Mapping[str, str]
    onnx: Mapping[str, str] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Compared(Generic[Measured]):
    """The results of the dense and of the pruned model."""

    dense: Measured
    pruned: Measured


TextStage = Stage[EvalRequest, TextInputs, TextQuality]
TaskStage = Stage[TaskRequest, TaskInputs, TaskQuality]

EVAL: TextStage = Stage(layout.EVAL, EvalRequest, TextInputs, TextQuality)
# Of a dense model alone: the same, with what others are compared with.
EVAL_DENSE: TextStage = Stage(f"{layout.EVAL}-dense", EvalRequest, TextInputs, TextQuality)
EVAL_ONNX: TextStage = Stage(f"{layout.EVAL}-onnx", EvalRequest, TextInputs, TextQuality)
EVAL_TASKS: TaskStage = Stage(f"{layout.EVAL}-tasks", TaskRequest, TaskInputs, TaskQuality)
EVAL_TASKS_ONNX: TaskStage = Stage(
    f"{layout.EVAL}-tasks-onnx", TaskRequest, TaskInputs, TaskQuality
)

# By what runs the model; see `evaluation.RUNTIMES`.
TEXT_STAGES: Mapping[str, TextStage] = {"torch": EVAL, "onnx": EVAL_ONNX}
TASK_STAGES: Mapping[str, TaskStage] = {"torch": EVAL_TASKS, "onnx": EVAL_TASKS_ONNX}
