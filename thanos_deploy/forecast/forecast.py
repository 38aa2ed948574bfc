"""What a pattern would bring on a GPU that is not here: a model's sizes, run through `roofline`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import UsageError
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
from thanos_deploy.model.structure import blocks_of
from thanos_deploy.model.widths import Widths
from thanos_deploy.pattern import Pattern, SemiStructured, Structured
from thanos_deploy.shrink import sizing

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
    """The sizes of a checkpoint, or of what it would be at other widths."""
    family, widths = checkpoint.family, widths or checkpoint.widths
    model = checkpoint.skeleton(widths)
    found: list[Block] = []
    for block, structure, width in zip(
        blocks_of(model, family), checkpoint.blocks, widths, strict=True
    ):
        gemms = []
        for group in structure.groups:
            shapes = [matrix(block.get_submodule(name)).shape for name in group]
            gemms.append(Gemm(" + ".join(group), sum(rows for rows, _ in shapes), shapes[0][1]))
        # Two norms, each of which reads its input and the residual and writes both.
        elementwise = 8 * gemms[0].inputs + (len(family.channels.producers) + 1) * width.channels
        found.append(Block(tuple(gemms), width, checkpoint.head_size, elementwise))
    head = matrix(model.get_output_embeddings()).shape  # type: ignore[no-untyped-call]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(tuple(Counter(found).items()), Gemm("lm_head", *head), parameters)


def variant(checkpoint: Checkpoint, pattern: Pattern) -> Variant:
    """What a pattern makes of a model.

    Raises:
        UsageError: structured, and nothing would be left, or the blocks differ already.
    """
    if not isinstance(pattern, Structured):
        return Variant(str(pattern), architecture(checkpoint), is_two_of_four(pattern))
    if len(set(checkpoint.widths)) > 1:
        raise UsageError(
            f"{pattern} of a model whose blocks differ in width",
            fix="give the model that it was cut from",
        )
    widths = [sizing.even(checkpoint, pattern.sparsity)] * len(checkpoint.widths)
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
class Request:
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


def plan(
    checkpoint: Checkpoint, patterns: Sequence[Pattern], setting: Setting, request: Request
) -> Json:
    """The forecast of a model, dense and with patterns, as one JSON-ready value; times in seconds.

    Raises:
        UsageError: see `variant`; or the request is longer than the model allows.
    """
    tokens = request.prompt + request.new_tokens
    if tokens > checkpoint.max_positions:
        raise UsageError(
            f"a prompt of {request.prompt} tokens and {request.new_tokens} new ones; the model "
            f"takes {checkpoint.max_positions}",
            fix="use smaller --prompt or --new-tokens",
        )
    variants = [Variant("dense", architecture(checkpoint), sparse=False)]
    variants += [variant(checkpoint, pattern) for pattern in patterns]
    gpu = setting.gpu
    passes = [_passes(variants, batch, setting, request) for batch in request.batches]
    return {
        "gpu": {"name": gpu.name, "product": gpu.product, "source": gpu.source},
        "dtype": setting.dtype,
        "prompt": request.prompt,
        "new_tokens": request.new_tokens,
        "measured_products": len(setting.measured),
        "widths": {
            one.name: [
                {"blocks": count, **asdict(block.widths)}
                for block, count in one.architecture.blocks
            ]
            for one in variants
        },
        "block_parameters": {one.name: one.architecture.block_parameters for one in variants},
        "passes": passes,
        "measured": [
            _measured(pattern, gpu.product)
            for pattern in patterns
            if gpu_figures.measured_as(pattern)
        ],
        "verdict": [
            _sentence(phase, one["batch"], _bound(layers["dense"]), one["seconds"][phase])
            for one in passes
            for phase, layers in one["layers"].items()
        ],
    }


def _passes(variants: Sequence[Variant], batch: int, setting: Setting, request: Request) -> Json:
    """Memory, and time of a prefill, a decode and the whole request, at one batch."""
    longest = batch * (request.prompt + request.new_tokens)
    memory = {one.name: one.architecture.memory(setting.dtype, longest) for one in variants}
    layers = {
        phase: {
            one.name: [asdict(found) for found in forecast(one, step, setting)] for one in variants
        }
        for phase, step in request.steps(batch).items()
    }
    seconds = {
        phase: {
            name: {kind: sum(one[kind] for one in found) for kind in ("likely", "best")}
            for name, found in variant_layers.items()
        }
        for phase, variant_layers in layers.items()
    }
    # The first new token comes with the prefill.
    seconds["request"] = {
        name: {
            kind: time[kind] + (request.new_tokens - 1) * seconds["decode"][name][kind]
            for kind in time
        }
        for name, time in seconds["prefill"].items()
    }
    return {
        "batch": batch,
        "memory_bytes": memory,
        "fits": {name: used <= setting.gpu.memory for name, used in memory.items()},
        "seconds": seconds,
        "layers": layers,
    }


def _measured(pattern: Pattern, product: str) -> str:
    """What was measured of a pattern on the GPU of a plan."""
    found = " ".join(gpu_figures.sentences(pattern, card=product))
    return f"{pattern} on {product}: {found or NOT_MEASURED}"


def _bound(layers: Sequence[Json]) -> str:
    """What most of the time of a pass goes to."""
    bounds: set[str] = {one["bound"] for one in layers}
    return max(
        bounds, key=lambda bound: sum(one["likely"] for one in layers if one["bound"] == bound)
    )


def _sentence(phase: str, batch: int, bound: str, times: Mapping[str, Mapping[str, float]]) -> str:
    """What every pattern brings to one pass."""
    dense = times["dense"]["likely"]
    parts = []
    for name, time in times.items():
        if name == "dense":
            continue
        likely, best = dense / time["likely"], dense / time["best"]
        helps = "will help" if round(likely, 2) >= _NOTICEABLE else "will not help"
        more = f", at best {best:.2f}x" if best >= likely + 0.005 else ""
        parts.append(f"{name} {helps} ({likely:.2f}x{more})")
    reason = {
        "compute": "takes its time for arithmetic",
        "memory": "waits for memory",
        "launch": "takes its time for starting kernels",
    }[bound]
    return f"{phase.capitalize()} at batch {batch} {reason}: {'; '.join(parts)}."
