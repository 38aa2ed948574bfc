"""Records of an evaluation in a bundle: quality on a text, or scores on tasks."""

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
    """How many questions of one kind a model answers right.

    Attributes:
        questions: number of questions.
        accuracy: share of right answers; see `proportion.share`.
        change: change of that share from the dense model to this one; see `proportion.change`. None
            if the model is not compared with a dense one.
    """

    questions: int
    accuracy: Interval
    change: Interval | None = None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a model is from the dense model; see `measure.fidelity`.

    Attributes:
        divergence: Kullback-Leibler divergence in nats per token of the text; None if the dense
            model computes its logits in an unknown way (see `has_plain_head`).
        agreement: share of the text's positions at which both models have the same likeliest token.
        texts: number of texts that the dense model wrote.
        tokens: tokens that it wrote in each text.
        continued: mean number of tokens in such a text that the model would also have written,
            given the tokens before.
        before_first: mean number of tokens in such a text before the first one that the model
            would not have written.
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
        frame: special tokens that each segment begins with; empty in records of old versions, which
            did not record it.
        words, choices: answers about the text, see `measure.cloze` and `measure.choices`; None if
            there were no questions, or none were asked.
        fidelity: comparison with the dense model; None if the model is not compared.
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
    """The score of a model on one task by one metric.

    Attributes:
        task, metric: the library's names; a filter other than "none" is added to the metric.
        value: the score, in the metric's own unit.
        stderr: the library's estimate of the standard error; None if it has none.
        samples: number of examples.
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
    """The inputs of an evaluation on a text.

    Attributes:
        model: hash of the pruned model; None for a dense one.
        dense: results of the dense model; None if this is the evaluation of the dense model.
        text: hash of the text.
        frame: ids of the special tokens that segments begin with.
        onnx: hashes of the files of the graph that was run; empty for PyTorch.
    """

    model: str | None = field(default=None, metadata=LATER)
    dense: TextQuality | None = field(default=None, metadata=LATER)
    text: str
    frame: tuple[int, ...] = field(default=(), metadata=LATER)
    onnx: Mapping[str, str] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """The inputs of an evaluation on tasks.

    Attributes:
        model, dense, onnx: see `TextInputs`.
        tasks: hashes of the task files in the user's folder, by name.
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
# The evaluation of a dense model, which also keeps the outputs that others are compared with.
EVAL_DENSE: TextStage = Stage(f"{layout.EVAL}-dense", EvalRequest, TextInputs, TextQuality)
EVAL_ONNX: TextStage = Stage(f"{layout.EVAL}-onnx", EvalRequest, TextInputs, TextQuality)
EVAL_TASKS: TaskStage = Stage(f"{layout.EVAL}-tasks", TaskRequest, TaskInputs, TaskQuality)
EVAL_TASKS_ONNX: TaskStage = Stage(
    f"{layout.EVAL}-tasks-onnx", TaskRequest, TaskInputs, TaskQuality
)

# The stages by runtime; see `evaluation.RUNTIMES`.
TEXT_STAGES: Mapping[str, TextStage] = {"torch": EVAL, "onnx": EVAL_ONNX}
TASK_STAGES: Mapping[str, TaskStage] = {"torch": EVAL_TASKS, "onnx": EVAL_TASKS_ONNX}
