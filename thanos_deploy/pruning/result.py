"""What pruning leaves in a bundle: what became of the layers, or of the widths of the blocks.

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
    """One linear layer, as it was written.

    Attributes:
        name: full name in the model.
        rows, cols: outputs and inputs.
        pattern: what it was pruned to, or "dense"; None in records from before each had its own.
        sparsity: fraction of zeros.
        pattern_holds: the written weight keeps the pattern everywhere.
        relative_error: fraction of the energy of the output that the layer aims at, on the
            calibration data, that the pruned weight misses; before it is tuned.
        damping: what the method used.
        solver: where the weight comes from; see `Solution`, and "none" for a dense layer. Empty in
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
    """One block: its layers and where the time went.

    Attributes:
        layers: its linear layers, in the order of the forward pass.
        seconds: time by activity; none for what was not done.
    """

    layers: tuple[PrunedLayer, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What a model was pruned with, as far as somebody asks.

    Attributes:
        pattern: the sparsity pattern, as it is spelled.
        method: name of the method.
        cut: heads and channels were cut out.
        recover: on how many segments what is left was trained.
        recover_text: of which text; see `PruneRequest`.
        recover_rank: of the updates that were trained, 0 for the weights themselves.
        quantize: what was quantised to; None for nothing.
        others: everything else; which there is depends on the method.
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
    """What pruning read.

    Attributes:
        model: hash of the dense model.
        text: of the calibration text; None where there is no record of it.
        frame: ids that segments begin with.
        sparsity_file: hash of a file of layers with patterns of their own.
        budget_measured: of a file of measured matrix products.
    """

    model: str | None = field(default=None, metadata=LATER)
    text: str | None = field(default=None, metadata=LATER)
    frame: tuple[int, ...] = field(default=(), metadata=LATER)
    sparsity_file: str | None = field(default=None, metadata=LATER)
    budget_measured: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What the training did.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the dense model in nats per token, taken
            while it learned, over each tenth of the steps in turn.
        tokens: that it learned from, repetitions counted.
        dtype: of the products: "bf16" or "fp32".
        seconds: of all of it.
        drawn: pieces of text that the dense model wrote for it, dropped ones too; None where it
            learned from the calibration text.
    """

    divergence: tuple[float, ...]
    tokens: int
    dtype: str
    seconds: float
    drawn: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class TunedBlocks:
    """What steps of all quantised layers of a block together did.

    Attributes:
        blocks: how many had them.
        better: of these, how many came nearer; the others were put back.
        median_error_before, median_error: over the blocks, of the mean over tokens of the squared
            error of what leaves a block, relative to its size, with the errors of the blocks before
            it; before the steps and in the end.
    """

    blocks: int
    better: int
    median_error_before: float
    median_error: float


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the linear layers of the blocks were quantised.

    Attributes:
        grid: what to; see `solver.grid`.
        median_relative_error: over the layers, fraction of the energy of the output that is lost;
            None if no layer had statistics.
        median_rounding_error: the same if every weight had been rounded.
        rounded: layers whose statistics could not be used, and why; they were rounded.
        tuned: what steps of whole blocks did after that; None if there were none.
        trained: what training the scales of the whole model did at last; None if they were not.
    """

    grid: str
    median_relative_error: float | None
    median_rounding_error: float | None
    rounded: Mapping[str, str]
    tuned: TunedBlocks | None = field(default=None, metadata=LATER)
    trained: Recovery | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Retry:
    """A layer whose statistics did not allow what was asked for.

    Attributes:
        layer: its name.
        solver: what was used in the end.
        damping: the same.
        failures: why what was tried before gave nothing.
    """

    layer: str
    solver: str
    damping: float
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WidthsSummary:
    """What becomes of the widths of a model.

    Attributes:
        removed: fraction of the blocks' parameters that goes.
        stock_config: a stock config.json describes the result.
        block_parameters_before, block_parameters_after: of all blocks together.
        predicted_loss: mean over the blocks.
        blocks: one for each block.
    """

    removed: float
    stock_config: bool
    block_parameters_before: int
    block_parameters_after: int
    predicted_loss: float
    blocks: tuple[BlockPlan, ...]


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of a checkpoint by part; see `parts`.

    Raises:
        ValueError: the two models have other parts.
    """

    dense: Mapping[str, int]
    pruned: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.dense.keys() != self.pruned.keys():
            raise ValueError(f"parts {', '.join(self.dense)} and {', '.join(self.pruned)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersSummary:
    """What became of the linear layers.

    The first eight are of zeros, so they are None where heads and channels were cut out, and those
    that came later are None in old records.

    Attributes:
        layers: how many there are.
        weights: of all of them.
        sparsity: fraction of these that is zero.
        patterns: how many layers were pruned to which pattern, or left dense.
        layers_left_dense: names.
        pattern_holds: every pruned layer keeps its pattern.
        layers_off_pattern: names of those that do not.
        retries: the layers whose statistics did not allow what was asked for.
        median_relative_error, worst_relative_error: see `PrunedLayer`.
        worst_layer: its name.
        largest_damping: that a method used.
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
    """What the stage prune reports.

    Attributes:
        widths: what was cut out; None if all shapes are the dense model's.
        choices: which groups of layers stayed dense under a budget, and what each saved and cost;
            None where there was no budget.
        recovery: what training what is left did; None if there was none.
        quantisation: what quantising did; None if there was none.
        frame: what calibration segments begin with.
        survey_seconds: of a walk through the dense model; None if there was none.
        collect_seconds, solve_seconds, tune_seconds, forward_seconds, journal_seconds: of all
            blocks together, by activity; see `layers.ACTIVITIES`.
        device: where it was done.
        peak_memory_bytes: of the process.
        dense_bytes: of the dense model's weights.
        parts: bytes of both models by part; None in records from before they were counted.
        tune_segments: that blocks were tuned on; 0 where they were not. Fewer than were asked for
            where the text has no more.
        discovered: what the blocks of the model are was found by a forward pass, as its type has
            no row; see `thanos_deploy.model.discovery`.
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
        """What became of the linear layers, alone."""
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
    """What the linear layers of a bundle were pruned to; none where heads and channels were cut.

    Args:
        bundle: with the stage prune finished.

    Raises:
        InputError: layers.json is not readable.
    """
    options = bundle.options(PRUNE)
    if options.cut:
        return {}
    blocks = read_record(bundle.path / layout.LAYERS, tuple[PrunedBlock, ...])
    return patterns_in(blocks, parse(options.pattern))


def patterns_in(blocks: Iterable[PrunedBlock], pattern: Pattern) -> dict[str, Pattern]:
    """What linear layers were pruned to.

    Args:
        blocks: as they were written.
        pattern: of the layers in a record from before each had its own.
    """
    own = {
        layer.name: str(pattern) if layer.pattern is None else layer.pattern
        for block in blocks
        for layer in block.layers
    }
    return {name: parse(spelling) for name, spelling in own.items() if spelling != DENSE}
