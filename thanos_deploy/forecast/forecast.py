"""Forecast what a pattern brings on a GPU, from the sizes of a model and `roofline`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thanos_deploy.errors import ModelError, UsageError
from thanos_deploy.forecast.pruning import PruningForecast
from thanos_deploy.forecast.roofline import (
    Architecture,
    Block,
    Gemm,
    Layer,
    Setting,
    Step,
    kernels,
    layer,
)
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.structure import blocks_of, structures_of
from thanos_deploy.model.widths import Widths
from thanos_deploy.pattern import Pattern, SemiStructured, Structured
from thanos_deploy.shrink import sizing

# The variant with which the others are compared.
DENSE = "dense"

# Less than this is no help.
_NOTICEABLE = 1.05


@dataclass(frozen=True, slots=True)
class Variant:
    """A model as a pattern leaves it.

    Attributes:
        name: the pattern, or "dense".
        architecture: its sizes.
        sparse: its linear layers are 2:4.
    """

    name: str
    architecture: Architecture
    sparse: bool


def architecture(checkpoint: Checkpoint, widths: Sequence[Widths] | None = None) -> Architecture:
    """The sizes of a checkpoint, or of what it would be at other widths.

    Raises:
        ModelError: its model type has no row, so that the sizes of its heads are not known.
    """
    if checkpoint.family.discovered:
        raise ModelError(
            f"{checkpoint.folder}: nothing can be forecast for a {checkpoint.config.model_type} "
            f"model: {checkpoint.family.heads.fixed}",
            fix="use a model of a supported type, or add a row for this type: "
            "docs/develop/add-a-family.md",
        )
    family, widths = checkpoint.family, widths or checkpoint.widths
    model = checkpoint.skeleton(widths)
    found: list[Block] = []
    for block, structure, width in zip(
        blocks_of(model, family), structures_of(model, family), widths, strict=True
    ):
        gemms = []
        for group in structure.groups:
            shapes = [matrix(block.get_submodule(name)).shape for name in group]
            gemms.append(Gemm(" + ".join(group), sum(rows for rows, _ in shapes), shapes[0][1]))
        # Two norms, each of which reads its input and the residual and writes both.
        gated = family.channels.rows * len(family.channels.producers)
        elementwise = 8 * gemms[0].inputs + (gated + 1) * width.channels
        found.append(Block(tuple(gemms), width, checkpoint.head_size, elementwise))
    head = matrix(model.get_output_embeddings()).shape  # type: ignore[no-untyped-call]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(tuple(Counter(found).items()), Gemm("lm_head", *head), parameters)


def variant(checkpoint: Checkpoint, pattern: Pattern) -> Variant:
    """The model after pruning to a pattern.

    Raises:
        UsageError: structured, and nothing would be left, or the blocks differ already.
    """
    if not isinstance(pattern, Structured):
        return Variant(str(pattern), architecture(checkpoint), is_two_of_four(pattern))
    if checkpoint.family.experts is None and len(set(checkpoint.widths)) > 1:
        raise UsageError(
            f"{pattern} cannot be forecast for a model whose blocks differ in width",
            fix="give the dense model that this model was cut from",
        )
    widths = sizing.even(checkpoint, pattern.sparsity)
    return Variant(str(pattern), architecture(checkpoint, widths), sparse=False)


def is_two_of_four(pattern: Pattern) -> bool:
    """Whether every weight with this pattern is 2:4 too, the one that tensor cores know."""
    return (
        isinstance(pattern, SemiStructured)
        and 4 % pattern.group == 0
        and pattern.kept * (4 // pattern.group) <= 2
    )


def forecast(variant: Variant, step: Step, setting: Setting) -> tuple[Layer, ...]:
    """One pass, layer by layer."""
    work = kernels(variant.architecture, step, setting.dtype)
    return tuple(layer(kernel, setting, sparse=variant.sparse) for kernel in work)


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked of the model.

    Attributes:
        batches: sequences at once; one forecast for each.
        prompt: tokens of each.
        new_tokens: tokens that are generated after it.
    """

    batches: tuple[int, ...]
    prompt: int
    new_tokens: int

    def steps(self, batch: int) -> dict[str, Step]:
        """The two kinds of passes; decoding at its middle."""
        return {
            "prefill": Step(batch, self.prompt, 0),
            "decode": Step(batch, 1, self.prompt + self.new_tokens // 2),
        }


@dataclass(frozen=True, slots=True)
class ForecastGpu:
    """The GPU of a forecast, and where its figures are from."""

    name: str
    product: str
    source: str


@dataclass(frozen=True, slots=True)
class EqualBlocks:
    """So many blocks of these widths."""

    blocks: int
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, slots=True)
class Seconds:
    """What is likely, and at best; they differ for 2:4 only."""

    likely: float
    best: float


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The forecast at one batch; mappings are by variant, "dense" or a pattern.

    Attributes:
        batch: sequences.
        memory_bytes: at the end of the request.
        fits: whether the GPU has that much.
        seconds: of "prefill", of "decode", one token, and of the whole "request".
        layers: of the two kinds of passes.
    """

    batch: int
    memory_bytes: Mapping[str, float]
    fits: Mapping[str, bool]
    seconds: Mapping[str, Mapping[str, Seconds]]
    layers: Mapping[str, Mapping[str, tuple[Layer, ...]]]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a model, dense and with patterns.

    Attributes:
        model: name of the model, as the user gave it.
        gpu: the GPU, and the source of its figures.
        dtype: of the blocks' linear layers.
        prompt, new_tokens: tokens in each prompt, and tokens generated after it.
        measured_products: number of measured matrix products that could replace the roofline.
        widths: widths of the blocks, by variant.
        block_parameters: weights of the blocks' linear layers, by variant.
        passes: one for each batch size.
        measured: sentences on what was measured with these patterns on that GPU.
        verdict: sentences on how much each pattern speeds up each pass.
        pruning: time and memory that pruning takes on that GPU, by preset; empty if not asked for.
    """

    model: str
    gpu: ForecastGpu
    dtype: str
    prompt: int
    new_tokens: int
    measured_products: int
    widths: Mapping[str, tuple[EqualBlocks, ...]]
    block_parameters: Mapping[str, int]
    passes: tuple[BatchForecast, ...]
    measured: tuple[str, ...]
    verdict: tuple[str, ...]
    pruning: tuple[PruningForecast, ...] = ()


def plan(
    checkpoint: Checkpoint,
    patterns: Sequence[Pattern],
    setting: Setting,
    request: Generation,
    *,
    model: str = "",
) -> Forecast:
    """The forecast of a model, dense and with patterns.

    Args:
        checkpoint: its sizes.
        patterns: what to compare with the dense model.
        setting: the GPU, the dtype and what was measured.
        request: what is asked of the model.
        model: what the user calls it.

    Raises:
        UsageError: see `variant`; or the request is longer than the model allows.
    """
    tokens = request.prompt + request.new_tokens
    if tokens > checkpoint.max_positions:
        raise UsageError(
            f"a prompt of {request.prompt} tokens and {request.new_tokens} new tokens are "
            f"together more than the {checkpoint.max_positions} tokens that the model takes",
            fix="use smaller --prompt or --new-tokens",
        )
    variants = [Variant(DENSE, architecture(checkpoint), sparse=False)]
    variants += [variant(checkpoint, pattern) for pattern in patterns]
    gpu = setting.gpu
    passes = tuple(_at_batch(variants, batch, setting, request) for batch in request.batches)
    return Forecast(
        model=model,
        gpu=ForecastGpu(gpu.name, gpu.product, gpu.source),
        dtype=setting.dtype,
        prompt=request.prompt,
        new_tokens=request.new_tokens,
        measured_products=len(setting.measured),
        widths={
            one.name: tuple(
                EqualBlocks(count, block.widths.heads, block.widths.kv_heads, block.widths.channels)
                for block, count in one.architecture.blocks
            )
            for one in variants
        },
        block_parameters={one.name: one.architecture.block_parameters for one in variants},
        passes=passes,
        measured=tuple(
            _measured(pattern, gpu.product)
            for pattern in patterns
            if gpu_figures.measured_as(pattern)
        ),
        verdict=tuple(
            _sentence(phase, one.batch, _bound(layers[DENSE]), one.seconds[phase])
            for one in passes
            for phase, layers in one.layers.items()
        ),
    )


def _at_batch(
    variants: Sequence[Variant], batch: int, setting: Setting, request: Generation
) -> BatchForecast:
    """Memory, and time of a prefill, a decode and the whole request, at one batch."""
    longest = batch * (request.prompt + request.new_tokens)
    memory = {one.name: one.architecture.memory(setting.dtype, longest) for one in variants}
    layers = {
        phase: {one.name: forecast(one, step, setting) for one in variants}
        for phase, step in request.steps(batch).items()
    }
    seconds = {
        phase: {name: _sum(found) for name, found in of_variants.items()}
        for phase, of_variants in layers.items()
    }
    # The first new token comes with the prefill.
    rest, prefill, decode = request.new_tokens - 1, seconds["prefill"], seconds["decode"]
    seconds["request"] = {
        name: Seconds(
            first.likely + rest * decode[name].likely, first.best + rest * decode[name].best
        )
        for name, first in prefill.items()
    }
    return BatchForecast(
        batch=batch,
        memory_bytes=memory,
        fits={name: used <= setting.gpu.memory for name, used in memory.items()},
        seconds=seconds,
        layers=layers,
    )


def _sum(layers: Sequence[Layer]) -> Seconds:
    return Seconds(sum(one.likely for one in layers), sum(one.best for one in layers))


def _measured(pattern: Pattern, product: str) -> str:
    """What was measured of a pattern on the GPU of a plan."""
    found = " ".join(gpu_figures.sentences(pattern, card=product))
    return f"{pattern} on {product}: {found or NOT_MEASURED}"


def _bound(layers: Sequence[Layer]) -> str:
    """What most of the time of a pass goes to."""
    bounds = {one.bound for one in layers}
    return max(bounds, key=lambda bound: sum(one.likely for one in layers if one.bound == bound))


def _sentence(phase: str, batch: int, bound: str, times: Mapping[str, Seconds]) -> str:
    """What every pattern brings to one pass."""
    dense = times[DENSE].likely
    parts = []
    for name, time in times.items():
        if name == DENSE:
            continue
        likely, best = dense / time.likely, dense / time.best
        helps = "will help" if round(likely, 2) >= _NOTICEABLE else "will not help"
        more = f", at best {best:.2f}x" if best >= likely + 0.005 else ""
        parts.append(f"{name} {helps} ({likely:.2f}x{more})")
    reason = {
        "compute": "is bound by arithmetic",
        "memory": "is bound by memory bandwidth",
        "launch": "is bound by kernel launches",
    }[bound]
    return f"{phase.capitalize()} at batch {batch} {reason}: {'; '.join(parts)}."
