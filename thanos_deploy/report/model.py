"""The dataclasses of report.json; report.schema.json describes every entry.

Sizes are in bytes and times in seconds. Ratios are pruned / dense. None means not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from thanos_deploy.bundle.codec import LATER, OTHERS, Json
from thanos_deploy.bundle.engine_record import BuildRecord
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.record import Source
from thanos_deploy.machine.environment import Environment
from thanos_deploy.measure.quality import Fidelity
from thanos_deploy.measure.run import Interval, Run, Sample
from thanos_deploy.model.loaders import LoaderVerdict
from thanos_deploy.pruning.budget import Choices
from thanos_deploy.pruning.result import LayersSummary, PartBytes

FORMAT: Final = "thanos-deploy/report/1"


@dataclass(frozen=True, slots=True)
class Pair:
    """Bytes of the dense and of the pruned model; `dense` is None where it is not known."""

    dense: int | None
    pruned: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of the dense and the pruned model.

    Attributes:
        text: name of the evaluation text.
        segments, length: number of segments, and number of tokens in each.
        frame: special tokens that each segment begins with; they are not scored.
        dense, pruned: perplexity of each model.
        ratio: pruned / dense.
        measure: name of the measure.
    """

    text: str
    segments: int
    length: int
    frame: tuple[str, ...]
    dense: float
    pruned: float
    ratio: float
    measure: Literal["perplexity"] = "perplexity"

    @property
    def measured_on(self) -> tuple[str, int, int, tuple[str, ...]]:
        """The conditions that two comparable perplexities share."""
        return self.text, self.segments, self.length, self.frame


@dataclass(frozen=True, slots=True)
class AnsweredQuestions:
    """Accuracy of the dense and the pruned model on questions made from the evaluation text.

    Attributes:
        kind: "last words" or "multiple choice"; see `measure.cloze` and `measure.choices`.
        questions: number of questions.
        dense, pruned: share of right answers of each model, with its confidence interval.
        change: share of the pruned model minus that of the dense model on the same questions,
            with its confidence interval.
    """

    kind: Literal["last words", "multiple choice"]
    questions: int
    dense: Interval
    pruned: Interval
    change: Interval


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Scores of the dense and the pruned model in one task by one metric.

    Attributes:
        task, metric, samples: see `quality.Score`.
        runtime: "torch" if the checkpoints were run, "onnx" if the exported graphs were.
        dense, pruned: score of each model.
        dense_stderr, pruned_stderr: standard errors as lm-evaluation-harness estimates them;
            None where it gives none.
    """

    task: str
    metric: str
    samples: int
    runtime: str
    dense: float
    pruned: float
    dense_stderr: float | None
    pruned_stderr: float | None


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Error and removed fraction of every layer, with one row for each block.

    Attributes:
        columns: names of the linear layers, relative to their blocks, with "*" for the number of an
            expert; "heads" and "channels" where these were cut out.
        error: relative error of the output, by block and column; the mean over experts. None if
            the block has no such layer.
        gone: fraction of the weights, heads or channels that was removed, likewise.
    """

    columns: tuple[str, ...]
    error: tuple[tuple[float | None, ...], ...]
    gone: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class WidthRange:
    """The distinct widths of the blocks before and after pruning, each in ascending order."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CutWidths:
    """The heads, channels, experts and blocks that structured pruning cut out.

    Attributes:
        removed: fraction of the blocks' parameters that was cut out.
        stock_config: whether a stock config.json describes the pruned model.
        block_parameters_before, block_parameters_after: parameters of all blocks together.
        heads, kv_heads, channels: numbers of heads, key-value heads and channels of a block.
        experts: numbers of experts of a block, over the blocks that have experts; None if none
            has.
        dropped: indices of the blocks that were removed as a whole. The widths above leave these
            blocks out.
    """

    removed: float
    stock_config: bool
    block_parameters_before: int
    block_parameters_after: int
    heads: WidthRange
    kv_heads: WidthRange
    channels: WidthRange
    experts: WidthRange | None = field(default=None, metadata=LATER)
    dropped: tuple[int, ...] = field(default=(), metadata=LATER)

    @property
    def drops_experts(self) -> bool:
        """Whether whole experts were cut out, rather than heads and channels."""
        return self.experts is not None and self.experts.before != self.experts.after


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Sizes of the weight files.

    Attributes:
        model: of the checkpoint.
        targets: of the exported files, by name of the target.
    """

    model: Pair
    targets: Mapping[str, Pair] = field(default_factory=dict, metadata=OTHERS)

    @property
    def deployed(self) -> Pair:
        """Sizes of the ONNX graph, or of the checkpoint if no graph was exported."""
        return self.targets.get(ONNX, self.model)


@dataclass(frozen=True, slots=True)
class Parity:
    """Difference between the outputs of ONNX Runtime and of PyTorch, relative to their range.

    Attributes:
        limit: largest difference that is allowed.
        cases: number of inputs that were compared.
        worst: largest difference that was found.
    """

    limit: float
    cases: int
    worst: float


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """The exported graph.

    Attributes:
        dtype: dtype of its weights.
        rounding: how far rounding to int8 moves the logits, relative to their range, by what is
            rounded: "weights" or "activations".
        weights: number of linear layers in the graph.
        weights_on_pattern: number of those whose weights keep their pattern, read back from the
            file; None where no weight is claimed to have a pattern.
        parity: comparison with PyTorch.
    """

    dtype: str
    rounding: Mapping[str, float]
    weights: int
    weights_on_pattern: int | None
    parity: Parity


@dataclass(frozen=True, slots=True)
class Gap:
    """What was not measured, why, and the command that measures it; None if no command does."""

    what: str
    why: str
    command: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """Everything that the report says about one pruned model.

    Attributes:
        label: name of the model, unique in the report.
        source: the base model.
        pattern, method: sparsity pattern and pruning method.
        quality: perplexity of the checkpoint, in PyTorch.
        graph_quality: perplexity of the exported graph, in ONNX Runtime.
        fidelity: how close the checkpoint is to the dense model; None if it was not measured.
        answers: accuracy of both models on questions about the text; empty if none were asked.
        tasks: scores of both models in tasks of lm-evaluation-harness.
        linear_layers: summary of the pruned linear layers.
        layer_map: error and removed fraction of every layer, block by block.
        widths: what was cut out; None if all shapes are the dense model's.
        choices: which layers stayed dense under a budget, and what each of these choices saves and
            costs; None if there was no budget.
        loaders: whether other loaders take the checkpoint.
        bytes: sizes of the weight files.
        parts: bytes of the checkpoint by part, such as "embeddings" and "attention".
        export: the exported graph.
        bench: the benchmark runs, without raw samples.
        kernels: contents of build.json of every engine.
        sample: texts that the models generated from one prompt.
        stale: names of the stages that were made from an earlier version of the model; their
            results are left out.
        commands: command lines that make the bundle again.
        seconds: duration of each stage, by name.
        options: options of each stage, by name.
        environment: the machine and the library versions with which the model was pruned.
        quoted_run: name of the benchmark run whose figures are quoted for the model; None if there
            is none.
        headline, verdict: the results in one sentence, and in several.
        not_measured: what was not measured, with the reasons.
    """

    label: str
    source: Source
    pattern: str
    method: str
    quality: Quality | None
    graph_quality: Quality | None
    fidelity: Fidelity | None = field(default=None, metadata=LATER)
    answers: tuple[AnsweredQuestions, ...] = field(default=(), metadata=LATER)
    tasks: tuple[TaskScores, ...]
    linear_layers: LayersSummary
    layer_map: LayerMap
    widths: CutWidths | None
    choices: Choices | None = field(default=None, metadata=LATER)
    loaders: tuple[LoaderVerdict, ...]
    bytes: FileBytes
    parts: PartBytes | None
    export: ExportSummary | None
    bench: tuple[Run, ...]
    kernels: tuple[BuildRecord, ...]
    sample: Sample | None
    stale: tuple[str, ...]
    commands: tuple[str, ...]
    seconds: Mapping[str, float]
    options: Mapping[str, Json]
    environment: Environment
    quoted_run: str | None = None
    headline: str = ""
    verdict: tuple[str, ...] = ()
    not_measured: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True)
class PlotPoint:
    """One model as a point of perplexity and cost; lower is better for both.

    Attributes:
        label: label of the model.
        perplexity: its perplexity.
        cost, low, high: estimate of the cost, and its confidence interval.
        valid: whether the benchmark run that measured the cost is VALID.
        dominated_by: labels of the models that dominate this one; see `pareto`.
    """

    label: str
    perplexity: float
    cost: float
    low: float
    high: float
    valid: bool = True
    dominated_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """Perplexity against one cost.

    Attributes:
        cost: name of the cost.
        unit: "B" for bytes, else the unit as the report prints it.
        points: the models that can be compared, the dense model first.
        left_out: labels of the models that cannot.
    """

    cost: str
    unit: str
    points: tuple[PlotPoint, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The report on one bundle, or on several side by side.

    Attributes:
        format: name and version of the format of this record.
        made_with: version of thanos-deploy that wrote it.
        title: title of the report.
        headline: the result in one sentence.
        notices: warnings that a reader must not overlook.
        models: one entry for each bundle.
        pareto: perplexity against each cost; empty for a report on one bundle.
    """

    format: Literal["thanos-deploy/report/1"]
    made_with: str
    title: str
    headline: str
    notices: tuple[str, ...]
    models: tuple[ModelReport, ...]
    pareto: tuple[Plot, ...]
