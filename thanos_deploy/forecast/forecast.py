"""Forecast the speed and memory of a pruned model on a GPU, from its sizes and `roofline`."""

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

# A pattern with a lower speedup than this is reported as no help.
_NOTICEABLE = 1.05


@dataclass(frozen=True, slots=True)
class Variant:
    """A model after pruning to a pattern, or the dense model.

    Attributes:
        name: the pattern, or "dense".
        architecture: sizes of the model.
        sparse: whether its linear layers are 2:4.
    """

    name: str
    architecture: Architecture
    sparse: bool


def architecture(checkpoint: Checkpoint, widths: Sequence[Widths] | None = None) -> Architecture:
    """The sizes of a checkpoint's model, or of the same model with other widths.

    Args:
        checkpoint: the model.
        widths: widths of each block; None for those of the checkpoint.

    Raises:
        ModelError: the model type is not in the table of families, so that the sizes of its
            attention heads are unknown.
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
        # Each of the two norms reads its input and the residual, and writes both. The activation
        # function reads all producers' outputs and writes one tensor.
        gated = family.channels.rows * len(family.channels.producers)
        elementwise = 8 * gemms[0].inputs + (gated + 1) * width.channels
        found.append(Block(tuple(gemms), width, checkpoint.head_size, elementwise))
    head = matrix(model.get_output_embeddings()).shape  # type: ignore[no-untyped-call]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(tuple(Counter(found).items()), Gemm("lm_head", *head), parameters)


def variant(checkpoint: Checkpoint, pattern: Pattern) -> Variant:
    """Return the model as it is after pruning to a pattern.

    Raises:
        UsageError: the pattern is structured, and it would leave nothing, or the model's blocks
            already differ in width.
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
    """Whether every weight with this pattern is also 2:4, the pattern of sparse tensor cores."""
    return (
        isinstance(pattern, SemiStructured)
        and 4 % pattern.group == 0
        and pattern.kept * (4 // pattern.group) <= 2
    )


def forecast(variant: Variant, step: Step, setting: Setting) -> tuple[Layer, ...]:
    """Forecast one forward pass, layer by layer."""
    work = kernels(variant.architecture, step, setting.dtype)
    return tuple(layer(kernel, setting, sparse=variant.sparse) for kernel in work)


@dataclass(frozen=True, slots=True)
class Generation:
    """The generation request that a forecast is for.

    Attributes:
        batches: batch sizes in sequences; there is one forecast for each.
        prompt: tokens of each prompt.
        new_tokens: tokens that are generated after each prompt.
    """

    batches: tuple[int, ...]
    prompt: int
    new_tokens: int

    def steps(self, batch: int) -> dict[str, Step]:
        """The prefill pass, and the decode pass halfway through the new tokens."""
        return {
            "prefill": Step(batch, self.prompt, 0),
            "decode": Step(batch, 1, self.prompt + self.new_tokens // 2),
        }


@dataclass(frozen=True, slots=True)
class ForecastGpu:
    """The GPU of a forecast and the source of its figures; see `Datasheet`."""

    name: str
    product: str
    source: str


@dataclass(frozen=True, slots=True)
class EqualBlocks:
    """A number of blocks that have the same widths."""

    blocks: int
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, slots=True)
class Seconds:
    """The likely time and the shortest possible time; they differ for 2:4 only."""

    likely: float
    best: float


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The forecast for one batch size.

    The innermost mappings are by variant: "dense" or a pattern.

    Attributes:
        batch: number of sequences.
        memory_bytes: bytes of weights and KV cache at the end of the request.
        fits: whether the GPU has that much memory.
        seconds: seconds of "prefill", of "decode" (one token) and of the whole "request".
        layers: the layers of "prefill" and of "decode".
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
        dtype: dtype of the blocks' linear layers.
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
    """Forecast a generation request for the dense model and for each pattern.

    Args:
        checkpoint: the dense model; only its sizes count.
        patterns: patterns to compare with the dense model.
        setting: the GPU, the dtype and the measured products.
        request: the prompts and new tokens.
        model: the name that the user gave the model.

    Raises:
        UsageError: see `variant`; or the request has more tokens than the model takes.
        ModelError: see `architecture`.
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
    """Forecast memory and times for one batch size."""
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
    # The prefill makes the first new token.
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
    """A sentence with the published measurements of a pattern on a GPU."""
    found = " ".join(gpu_figures.sentences(pattern, card=product))
    return f"{pattern} on {product}: {found or NOT_MEASURED}"


def _bound(layers: Sequence[Layer]) -> str:
    """The bound ("compute", "memory" or "launch") with the largest share of a pass's time."""
    bounds = {one.bound for one in layers}
    return max(bounds, key=lambda bound: sum(one.likely for one in layers if one.bound == bound))


def _sentence(phase: str, batch: int, bound: str, times: Mapping[str, Seconds]) -> str:
    """A sentence with the forecast speedup of one pass by every pattern."""
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
