"""Records that pruning leaves in a bundle: its options and inputs, and reports on its steps.

Standard library only, so that a report needs no PyTorch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import LATER, OTHERS, Json
from thanos_deploy.bundle.files import read_record
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage
from thanos_deploy.calibration.frame import NO_FRAME, Frame
from thanos_deploy.model.assignment import DENSE
from thanos_deploy.model.block import BlockPlan
from thanos_deploy.pattern import Pattern, parse
from thanos_deploy.pruning.budget import Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedLayer:
    """Report on one linear layer, as it was written.

    Attributes:
        name: full name in the model.
        rows, cols: numbers of outputs and inputs.
        pattern: the pattern it was pruned to, or "dense"; None in records from before layers had
            patterns of their own.
        sparsity: fraction of zeros.
        pattern_holds: whether the written weight has the pattern everywhere.
        relative_error: fraction of the energy of the target output, on the calibration data, that
            the pruned weight misses; before tuning.
        damping: the damping that the method used.
        solver: how the weight was computed; see `Solution`, and "none" for a dense layer. Empty in
            records from before there was a choice, like `failures`.
        failures: see `Solution`.
        seconds: time that the method took.
    """

    name: str
    rows: int
    cols: int
    pattern: str | None = None
    sparsity: float
    pattern_holds: bool
    relative_error: float
    damping: float
    solver: str = ""
    failures: tuple[str, ...] = ()
    seconds: float


@dataclass(frozen=True, slots=True)
class PrunedBlock:
    """Report on one block: its layers and where the time went.

    Attributes:
        layers: reports on its linear layers, in the order of the forward pass.
        seconds: time by activity; activities that did not take place are absent.
    """

    layers: tuple[PrunedLayer, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """The options that a model was pruned with; those that other code reads have fields.

    Attributes:
        pattern: the sparsity pattern, as it is spelled.
        method: name of the method.
        cut: whether heads and channels were cut out.
        recover: number of segments that the remaining weights were trained on.
        recover_text: the kind of text that they were trained on; see `PruneRequest`.
        recover_rank: rank of the low-rank updates that were trained; 0 for the weights themselves.
        quantize: the grid that the weights were quantised to; None if they were not.
        others: all other options, which depend on the method.
    """

    pattern: str
    method: str
    cut: bool = field(default=False, metadata=LATER)
    recover: int = field(default=0, metadata=LATER)
    recover_text: str = field(default="calib", metadata=LATER)
    recover_rank: int = field(default=0, metadata=LATER)
    quantize: str | None = field(default=None, metadata=LATER)
    others: Json = field(default_factory=dict, metadata=OTHERS)


@dataclass(frozen=True, slots=True)
class PruneInputs:
    """The inputs of pruning.

    Attributes:
        model: hash of the dense model.
        text: hash of the calibration text; None where it was not recorded.
        frame: token ids that segments begin with.
        sparsity_file: hash of the file that gives layers their own patterns.
        budget_measured: hash of the file with measured times of matrix products.
    """

    model: str | None = field(default=None, metadata=LATER)
    text: str | None = field(default=None, metadata=LATER)
    frame: tuple[int, ...] = field(default=(), metadata=LATER)
    sparsity_file: str | None = field(default=None, metadata=LATER)
    budget_measured: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Report on the training of a pruned or quantised model.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the dense model in nats per token, taken
            during the training, over each tenth of the steps in turn.
        tokens: number of tokens that the model was trained on, repetitions included.
        dtype: dtype of the matrix products: "bf16" or "fp32".
        seconds: time that the training took.
        drawn: number of pieces of text that the dense model generated for it, including dropped
            ones; None if the model was trained on the calibration text.
    """

    divergence: tuple[float, ...]
    tokens: int
    dtype: str
    seconds: float
    drawn: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class TunedBlocks:
    """Report on tuning the quantised layers of each block together.

    Attributes:
        blocks: number of blocks that were tuned.
        better: number of these blocks whose error became smaller; the others were restored.
        median_error_before, median_error: median over the blocks before and after tuning. The error
            of a block is the mean over the tokens of the squared error of its output, relative to
            the output's size, and includes the errors of the blocks before it.
    """

    blocks: int
    better: int
    median_error_before: float
    median_error: float


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Report on quantising the linear layers of the blocks.

    Attributes:
        grid: the grid; see `solver.grid`.
        median_relative_error: median over the layers of the fraction of the energy of the target
            output, on the calibration data, that the quantised weight misses; None if no layer had
            usable statistics.
        median_rounding_error: the same if every weight had been rounded.
        rounded: maps the layers that were rounded, because their statistics could not be used, to
            the reason.
        tuned: report on tuning whole blocks afterwards; None if they were not tuned.
        trained: report on training the scales of the whole model; None if they were not trained.
    """

    grid: str
    median_relative_error: float | None
    median_rounding_error: float | None
    rounded: Mapping[str, str]
    tuned: TunedBlocks | None = field(default=None, metadata=LATER)
    trained: Recovery | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Retry:
    """A layer whose statistics did not allow the requested solver or damping.

    Attributes:
        layer: its name.
        solver: the solver that was used in the end.
        damping: the damping that was used in the end.
        failures: the reasons why earlier attempts failed.
    """

    layer: str
    solver: str
    damping: float
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WidthsSummary:
    """The widths that a model is cut to, and the parameters that remain.

    Attributes:
        removed: fraction of the blocks' parameters that is removed.
        stock_config: whether a stock config.json describes the result.
        block_parameters_before, block_parameters_after: number of parameters of all blocks
            together.
        predicted_loss: mean of the predicted losses of the blocks.
        blocks: one plan for each block.
    """

    removed: float
    stock_config: bool
    block_parameters_before: int
    block_parameters_after: int
    predicted_loss: float
    blocks: tuple[BlockPlan, ...]


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of the dense and of the pruned checkpoint, by part; see `thanos_deploy.model.parts`.

    Raises:
        ValueError: the two checkpoints have different parts.
    """

    dense: Mapping[str, int]
    pruned: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.dense.keys() != self.pruned.keys():
            raise ValueError(f"parts {', '.join(self.dense)} and {', '.join(self.pruned)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersSummary:
    """Summary of the reports on the linear layers.

    If heads and channels were cut out, the fields from `layers` to `layers_off_pattern` are None,
    because they describe zeros. Fields that were added later are None in old records.

    Attributes:
        layers: number of linear layers.
        weights: number of weights in all of them.
        sparsity: fraction of these weights that is zero.
        patterns: number of layers by the pattern they were pruned to, or left dense.
        layers_left_dense: names of the layers left dense.
        pattern_holds: whether every pruned layer has its pattern everywhere.
        layers_off_pattern: names of the pruned layers that do not have their pattern everywhere.
        retries: the layers whose statistics did not allow the requested solver or damping; None if
            heads and channels were cut out and every part could be fitted.
        median_relative_error, worst_relative_error: see `PrunedLayer`; in a cut model, of the heads
            and the channels of every block.
        worst_layer: name of the layer, or of the part of a block, with the worst relative error.
        largest_damping: largest damping that a method used.
    """

    layers: int | None = field(default=None, metadata=LATER)
    weights: int | None = field(default=None, metadata=LATER)
    sparsity: float | None = field(default=None, metadata=LATER)
    patterns: Mapping[str, int] | None = field(default=None, metadata=LATER)
    layers_left_dense: tuple[str, ...] | None = field(default=None, metadata=LATER)
    pattern_holds: bool | None = field(default=None, metadata=LATER)
    layers_off_pattern: tuple[str, ...] | None = field(default=None, metadata=LATER)
    retries: tuple[Retry, ...] | None = field(default=None, metadata=LATER)
    median_relative_error: float
    worst_relative_error: float
    worst_layer: str
    largest_damping: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult(LayersSummary):
    """Result of the stage prune.

    Attributes:
        widths: the widths that the model was cut to; None if all shapes are the dense model's.
        choices: which groups of layers stayed dense under a budget, and what each saved and cost;
            None if there was no budget.
        recovery: report on training the remaining weights; None if they were not trained.
        quantisation: report on quantising the model; None if it was not quantised.
        frame: the tokens that calibration segments begin with.
        survey_seconds: seconds of the walk through the dense model; None if there was none.
        collect_seconds, solve_seconds, tune_seconds, forward_seconds, journal_seconds: seconds of
            all blocks together, by activity; see `layers.ACTIVITIES`.
        device: the device on which the model was pruned.
        peak_memory_bytes: peak memory of the process.
        dense_bytes: bytes of the dense model's weights.
        parts: bytes of both models by part; None in records from before they were counted.
        tune_segments: number of segments that blocks were tuned on; 0 if they were not tuned. Fewer
            than requested if the text has no more.
        discovered: whether the structure of the blocks was found by a forward pass, because the
            family table has no row for the model type; see `thanos_deploy.model.discovery`.
    """

    widths: WidthsSummary | None = field(default=None, metadata=LATER)
    choices: Choices | None = field(default=None, metadata=LATER)
    recovery: Recovery | None = field(default=None, metadata=LATER)
    quantisation: Quantisation | None = field(default=None, metadata=LATER)
    frame: Frame = NO_FRAME
    survey_seconds: float | None = field(default=None, metadata=LATER)
    collect_seconds: float = 0.0
    solve_seconds: float = 0.0
    tune_seconds: float = 0.0
    forward_seconds: float = 0.0
    journal_seconds: float = 0.0
    device: str | None = None
    peak_memory_bytes: int | None = None
    dense_bytes: int
    parts: PartBytes | None = None
    tune_segments: int = field(default=0, metadata=LATER)
    discovered: bool = field(default=False, metadata=LATER)

    @property
    def linear_layers(self) -> LayersSummary:
        """The fields of the `LayersSummary` alone."""
        return LayersSummary(
            **{field.name: getattr(self, field.name) for field in fields(LayersSummary)}
        )


PRUNE: Stage[PruneOptions, PruneInputs, PruneResult] = Stage(
    layout.PRUNE, PruneOptions, PruneInputs, PruneResult
)


def codes_of(bundle: Bundle) -> Path | None:
    """The folder with the codes of a bundle's model; None if it was not quantised."""
    quantised = bundle.options(PRUNE).quantize is not None
    return bundle.path / layout.CODES if quantised else None


def patterns_of(bundle: Bundle) -> dict[str, Pattern]:
    """The patterns that the linear layers of a bundle were pruned to, by full name.

    Empty if heads and channels were cut out.

    Args:
        bundle: a bundle whose stage prune is finished.

    Raises:
        InputError: layers.json is not readable.
    """
    options = bundle.options(PRUNE)
    if options.cut:
        return {}
    blocks = read_record(bundle.path / layout.LAYERS, tuple[PrunedBlock, ...])
    return patterns_in(blocks, parse(options.pattern))


def patterns_in(blocks: Iterable[PrunedBlock], pattern: Pattern) -> dict[str, Pattern]:
    """The patterns that linear layers were pruned to, by full name, without dense layers.

    Args:
        blocks: the reports on the blocks.
        pattern: pattern of the layers whose report is from before layers had their own.
    """
    own = {
        layer.name: str(pattern) if layer.pattern is None else layer.pattern
        for block in blocks
        for layer in block.layers
    }
    return {name: parse(spelling) for name, spelling in own.items() if spelling != DENSE}
