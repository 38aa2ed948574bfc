"""The report as a value: what report.json holds. report.schema.json describes every entry.

Bytes are bytes, times are seconds, ratios are pruned / dense, None is not measured.
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
    """Bytes of the dense and of the pruned model; None where the dense one's were not seen."""

    dense: int | None
    pruned: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of the dense and the pruned model.

    Attributes:
        text: where the text is from.
        segments, length: how many, and tokens of each.
        frame: tokens that each begins with.
        dense, pruned: the values.
        ratio: pruned / dense.
        measure: what is measured.
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
        """What two perplexities have to share to be comparable."""
        return self.text, self.segments, self.length, self.frame


@dataclass(frozen=True, slots=True)
class AnsweredQuestions:
    """The dense and the pruned model on questions made from the text.

    Attributes:
        kind: "last words" or "multiple choice"; see `measure.cloze` and `measure.choices`.
        questions: how many.
        dense, pruned: shares of right answers, with their intervals.
        change: of that share, on the same questions, with its interval.
    """

    kind: Literal["last words", "multiple choice"]
    questions: int
    dense: Interval
    pruned: Interval
    change: Interval


@dataclass(frozen=True, slots=True)
class TaskScores:
    """The dense and the pruned model in one task by one metric.

    Attributes:
        task, metric, samples: see `quality.Score`.
        runtime: what ran the model, "torch" or "onnx".
        dense, pruned: what they reached.
        dense_stderr, pruned_stderr: the library's estimates.
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
    """A row for each block, a column for each linear layer, or for heads and channels.

    Attributes:
        columns: names.
        error: relative errors of the output.
        gone: fractions that are gone.
    """

    columns: tuple[str, ...]
    error: tuple[tuple[float, ...], ...]
    gone: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class WidthRange:
    """The different widths that blocks had and have, in ascending order."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CutWidths:
    """What was cut out.

    Attributes:
        removed: fraction of the blocks' parameters.
        stock_config: a stock config.json describes the result.
        block_parameters_before, block_parameters_after: of all blocks together.
        heads, kv_heads, channels: the widths.
        experts: the same, of the blocks that have some; None if none does.
        dropped: numbers of the blocks that are gone as a whole, which the widths leave out.
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
        """Experts were cut out, and not channels or heads."""
        return self.experts is not None and self.experts.before != self.experts.after


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Of the weight files: of the checkpoint, and by name of a target, of what was exported."""

    model: Pair
    targets: Mapping[str, Pair] = field(default_factory=dict, metadata=OTHERS)

    @property
    def deployed(self) -> Pair:
        """Of the graph, or of the checkpoint if there is none."""
        return self.targets.get(ONNX, self.model)


@dataclass(frozen=True, slots=True)
class Parity:
    """How far ONNX Runtime and PyTorch are apart.

    Attributes:
        limit: the most that is allowed.
        cases: how many were compared.
        worst: the largest difference.
    """

    limit: float
    cases: int
    worst: float


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """The exported graph.

    Attributes:
        dtype: of its weights.
        rounding: how far rounding moved the results, by what is rounded.
        weights: how many it has.
        weights_on_pattern: in how many the pattern holds, read from the file; None where none is
            claimed.
        parity: with PyTorch.
    """

    dtype: str
    rounding: Mapping[str, float]
    weights: int
    weights_on_pattern: int | None
    parity: Parity


@dataclass(frozen=True, slots=True)
class Gap:
    """What was not measured, why, and the command that changes it, if one does."""

    what: str
    why: str
    command: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What is known of one pruned model.

    Attributes:
        label: unique in the report.
        source: the base model.
        pattern, method: what it was pruned to and by what.
        quality: of the checkpoint, in PyTorch.
        graph_quality: of the exported graph.
        fidelity: of the checkpoint to the dense model; None where it was not measured.
        answers: of both about the text; none where nothing was asked.
        tasks: scores.
        linear_layers: what became of them.
        layer_map: the same, block by block.
        widths: what was cut out; None if all shapes are the dense model's.
        choices: which layers stayed dense under a budget, and what each choice bought; None where
            there was no budget.
        loaders: what other loaders make of the checkpoint.
        bytes: of the files.
        parts: bytes of the checkpoint by part.
        export: the graph.
        bench: the runs, without raw samples.
        kernels: build.json of every engine.
        sample: what the models write.
        stale: stages that were made from an earlier model and are left out.
        commands: what makes the bundle again.
        seconds: of the stages, by name.
        options: of the stages, by name.
        environment: what it was pruned on.
        quoted_run: name of the run whose figures stand for the model.
        headline, verdict: what it comes to, in sentences.
        not_measured: what a reader may look for in vain.
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
    """A model as a pair of quality and cost, both the lower the better.

    Attributes:
        label: of the model.
        perplexity: its quality.
        cost, low, high: estimate and interval.
        valid: the run that the cost is from counts.
        dominated_by: labels of those that make it pointless.
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
    """Quality against one cost.

    Attributes:
        cost: its name.
        unit: "B" for bytes, else as it is written.
        points: the models that can be compared, the dense one first.
        left_out: labels of the others.
    """

    cost: str
    unit: str
    points: tuple[PlotPoint, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The report on one bundle, or on several side by side.

    Attributes:
        format: format of this record.
        made_with: version of thanos-deploy.
        title: what the report is about.
        headline: the verdict in one sentence.
        notices: notices that a reader must not overlook.
        models: one for each bundle.
        pareto: quality against each cost; empty for one model.
    """

    format: Literal["thanos-deploy/report/1"]
    made_with: str
    title: str
    headline: str
    notices: tuple[str, ...]
    models: tuple[ModelReport, ...]
    pareto: tuple[Plot, ...]
