"""The plan of a pruning run: what it would do, and its time, memory and disk."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos_deploy.bundle.codec import LATER
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.record import Source
from thanos_deploy.forecast.estimate import Estimate, estimate, estimate_cutting
from thanos_deploy.forecast.memory import Memory
from thanos_deploy.machine import devices
from thanos_deploy.measure.options import BenchRequest, EvalRequest
from thanos_deploy.model import assignment
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.locate import LocatedModel, locate_configuration
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning import layers as pruning
from thanos_deploy.pruning.budget import Choices
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import WidthsSummary
from thanos_deploy.shrink import depth
from thanos_deploy.shrink.depth import Removal
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.sizing import Losses
from thanos_deploy.stages import summary
from thanos_deploy.stages.checkpoints import (
    check,
    disk_bytes,
    plan_widths,
    survey_blocks,
    survey_depth,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.patterns import assigned, possible_choices
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import calibration


def outline(model: str | LocatedModel, *, revision: str | None, announce: Announce) -> Checkpoint:
    """Return a model's shapes, from its configuration alone; a GGUF file is converted first."""
    if isinstance(model, LocatedModel):
        return Checkpoint.outline(model.path)
    folder = locate_configuration(model, revision=revision)
    if folder is None:
        return Dense(model).checkpoint(announce)
    return Checkpoint.outline(folder)


@dataclass(frozen=True, slots=True)
class Taken:
    """The estimated time and memory of the stages.

    Attributes:
        seconds: time of each activity of the stage prune, and of the stage eval.
        total_seconds: sum of `seconds`.
        memory_bytes: peak host memory of the process.
        memory: peak memory of the host and of the GPU, each as a list of terms.
        basis: what the estimate is derived from.
        not_estimated: stages and steps whose time is not in the estimate.
    """

    seconds: Mapping[str, float]
    total_seconds: float
    memory_bytes: int
    memory: Memory
    basis: str
    not_estimated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What the stage prune, or all stages, would do, and the time, memory and disk that this takes.

    Attributes:
        model: the dense model.
        model_type: type of the model in its configuration, followed by "(discovered)" if the type
            has no row in `model.families`.
        parameters: number of parameters of the dense model.
        linear_layers, linear_weights: number of linear layers in the blocks, and of their weights.
        prune: the options of the stage prune, as the manifest would record them.
        device: device that would compute.
        disk_bytes_needed, disk_bytes_free: bytes on the disk of the bundle; the part that the
            journal needs is free again after pruning.
        estimate: time and memory.
        widths: what each block would keep; None if nothing is cut out.
        patterns: number of layers by the pattern that they would be pruned to; None if heads and
            channels are cut out.
        layers_left_dense: names of the layers that would stay dense; None if heads and channels
            are cut out.
        linear_weights_removed: number of weights that would be set to zero; None if heads and
            channels are cut out.
        choices: with `budget`, what pruning each group of layers would save; else None. The loss
            that pruning a group causes is not measured here; groups that would save nothing would
            stay dense.
        eval, bench: the options of these stages; None for the stage prune alone.
        stages: "done" or "to do" for each stage; None for the stage prune alone.
        cache: the folder in the cache for the dense model's files; None for the stage prune alone.
        cache_bytes_needed: bytes needed in this folder; None for the stage prune alone.
    """

    model: Source
    model_type: str
    parameters: int
    linear_layers: int
    linear_weights: int
    prune: Json
    device: str
    disk_bytes_needed: int
    disk_bytes_free: int
    estimate: Taken
    widths: WidthsSummary | None = field(default=None, metadata=LATER)
    patterns: Mapping[str, int] | None = field(default=None, metadata=LATER)
    layers_left_dense: tuple[str, ...] | None = field(default=None, metadata=LATER)
    linear_weights_removed: int | None = field(default=None, metadata=LATER)
    choices: Choices | None = field(default=None, metadata=LATER)
    eval: EvalRequest | None = field(default=None, metadata=LATER)
    bench: BenchRequest | None = field(default=None, metadata=LATER)
    stages: Mapping[str, str] | None = field(default=None, metadata=LATER)
    cache: str | None = field(default=None, metadata=LATER)
    cache_bytes_needed: int | None = field(default=None, metadata=LATER)


def plan_prune(
    model: str | LocatedModel,
    out: Path,
    request: PruneRequest,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> DryRun:
    """Plan the stage prune, and refuse what `prune` would refuse; nothing is written to `out`.

    If heads, channels or blocks are to be cut out, the plan includes the widths of every block and
    the loss predicted for them, which takes a walk through the dense model.
    """
    dense = Dense(model, revision=revision)
    check(dense.checkpoint(announce), request)
    return plan_pruning(dense, request, out, announce)


def plan_pruning(
    dense: Dense,
    request: PruneRequest,
    out: Path,
    announce: Announce,
    evaluation: EvalRequest | None = None,
) -> DryRun:
    """Plan the stage prune; with an evaluation, estimate the stages after it as well."""
    source, device = dense.checkpoint(announce), request.chosen_device
    entries = {name: math.prod(shape) for name, shape in pruning.linear_shapes(source).items()}
    taken = calibration(source, request.data, request.how.tuning.further(request.data.nsamples))
    ids = taken.ids
    exported = 0 if evaluation is None else 4 * source.parameters

    def planned(found: Estimate, **what: Any) -> DryRun:
        return DryRun(
            model=dense.source,
            model_type=source.config.model_type
            + (" (discovered)" if source.family.discovered else ""),
            parameters=source.parameters,
            linear_layers=len(entries),
            linear_weights=sum(entries.values()),
            prune=request.to_json(),
            device=devices.describe(device),
            disk_bytes_needed=disk_bytes(source, ids, taken.further, request) + exported,
            disk_bytes_free=shutil.disk_usage(_existing(out)).free,
            estimate=_estimated(source, found, request, evaluation),
            **what,
        )

    match request.how:
        case Cut() as cut:
            surveyed: Sequence[Losses] | Sequence[Removal]
            if cut.sizing.drops_blocks:
                surveyed = survey_depth(source, ids, cut, announce, device=device)
                widths = depth.plan(source, surveyed)
            else:
                surveyed = survey_blocks(
                    source, ids, cut, announce, device=device, hold=request.activations
                )
                widths = plan_widths(source, surveyed, cut)
            found = estimate_cutting(
                source,
                ids,
                cut.fit,
                sum(sum(one.seconds.values()) for one in surveyed),
                widths,
                tuning=cut.tuning,
                further=len(taken.further),
                device=device,
            )
            return planned(found, widths=summary.of_widths(widths))
        case Recipe() as recipe:
            patterns = assigned(source, recipe)
            dtype = DTYPES.get(request.dtype)
            return planned(
                estimate(
                    source,
                    ids,
                    recipe,
                    patterns,
                    further=len(taken.further),
                    grid=request.grid,
                    dtype=dtype,
                    device=device,
                    place=request.activations,
                ),
                patterns=assignment.counts(patterns.get(name) for name in entries),
                layers_left_dense=tuple(name for name in entries if name not in patterns),
                linear_weights_removed=sum(
                    int(entries[name] * its.sparsity) for name, its in patterns.items()
                ),
                choices=possible_choices(source, recipe),
            )


def _estimated(
    source: Checkpoint, found: Estimate, request: PruneRequest, evaluation: EvalRequest | None
) -> Taken:
    seconds = dict(found.seconds)
    if evaluation is not None:
        # The dense and the pruned model are evaluated. The output head is counted as so many more
        # blocks as its weights amount to.
        blocks = source.config.num_hidden_layers
        weights = sum(math.prod(shape) for shape in pruning.linear_shapes(source).values())
        head = source.config.vocab_size * source.config.hidden_size * blocks / weights
        tokens = 2 * evaluation.segments * evaluation.seqlen
        seconds["eval"] = tokens * found.token_seconds * (blocks + head)
    return Taken(
        seconds=seconds,
        total_seconds=sum(seconds.values()),
        memory_bytes=found.memory.host_bytes,
        memory=found.memory,
        basis=found.basis,
        not_estimated=(
            *(["recover"] if request.recover else []),
            *(["quantize"] if request.grid is not None and "quantize" not in seconds else []),
            *([] if evaluation is None else ["onnx", "bench"]),
        ),
    )


def _existing(path: Path) -> Path:
    """Return the path itself or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
