"""The steps of the stage prune on a checkpoint, one function each, and their needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.sizes import activation_bytes
from thanos_deploy.errors import UsageError
from thanos_deploy.forecast import memory
from thanos_deploy.forecast.memory import Memory
from thanos_deploy.machine import devices
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.pattern import Pattern, Structured
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning import layers as pruning
from thanos_deploy.pruning import owl
from thanos_deploy.pruning import sensitivity as sensitive
from thanos_deploy.pruning.owl import Outliers
from thanos_deploy.pruning.quantise import QuantisedBlock, quantise_model
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedBlock, Quantisation
from thanos_deploy.pruning.sensitivity import Sensitivity
from thanos_deploy.ranks.group import current
from thanos_deploy.shrink import cut as shrinking
from thanos_deploy.shrink import depth, experts, sizing
from thanos_deploy.shrink.depth import Removal
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Losses, Plan
from thanos_deploy.shrink.survey import survey
from thanos_deploy.solver.grid import Grid
from thanos_deploy.stages.patterns import allocated, assigned, choices_of, possible_choices
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.training import replace_checkpoint


def prune_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path | None,
    recipe: Recipe,
    announce: Announce = quietly,
    *,
    further: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device = devices.CPU,
    hold: Place = "auto",
    outliers: Journal[Outliers] | None = None,
    sensitivity: Journal[Sensitivity] | None = None,
    journal: Journal[PrunedBlock] | None = None,
) -> list[PrunedBlock]:
    """Prune a checkpoint by a recipe, on given calibration tokens; see `layers.prune`.

    If the recipe needs a walk that first decides what each block or layer loses, the walk keeps its
    progress in the journal `outliers` (OWL) or `sensitivity` (a budget or `keep_dense`).
    """
    patterns: Mapping[str, Pattern] = assigned(source, recipe)
    if recipe.owl is not None:
        counted = owl.survey(
            source,
            ids,
            patterns,
            recipe.owl,
            device=device,
            hold=hold,
            journal=outliers,
            on_progress=announce("Count the outliers of each block"),
        )
        patterns = allocated(source, recipe.owl, recipe.pattern.sparsity, patterns, counted)
    if recipe.tries_layers:
        tried = sensitive.survey(
            source,
            ids,
            patterns,
            recipe,
            device=device,
            hold=hold,
            journal=sensitivity,
            on_progress=announce("Measure how much pruning each layer changes the model"),
        )
        choices = choices_of(source, recipe, tried)
        dense = {name for group in choices.groups if group.dense for name in group.layers}
        patterns = {name: its for name, its in patterns.items() if name not in dense}
    return pruning.prune(
        source,
        ids,
        destination,
        recipe,
        further=further,
        patterns=patterns,
        dtype=dtype,
        device=device,
        hold=hold,
        journal=journal,
        on_progress=announce(f"Prune to {recipe.pattern} with {recipe.method}"),
    )


def survey_blocks(
    source: Checkpoint,
    ids: Tensor,
    cut: Cut,
    announce: Announce = quietly,
    *,
    device: torch.device = devices.CPU,
    hold: Place = "auto",
    journal: Journal[Losses] | None = None,
) -> list[Losses]:
    """Measure what each block would lose at each width, whatever fraction is to be removed."""
    return survey(
        source,
        ids,
        multiple=cut.sizing.multiple,
        damping=cut.fit,
        device=device,
        hold=hold,
        journal=journal,
        on_progress=announce("Measure what each block would lose"),
    )


def survey_depth(
    source: Checkpoint,
    ids: Tensor,
    cut: Cut,
    announce: Announce = quietly,
    *,
    device: torch.device = devices.CPU,
    journal: Journal[Removal] | None = None,
) -> list[Removal]:
    """Choose the blocks that are dropped as a whole; see `depth.survey`."""
    return depth.survey(
        source,
        ids,
        cut.pattern.sparsity,
        device=device,
        journal=journal,
        on_progress=announce("Measure the model without each of its blocks"),
    )


def plan_widths(source: Checkpoint, losses: Sequence[Losses], cut: Cut) -> Plan:
    """Choose the widths of the blocks of the shrunk model."""
    return sizing.plan(source, losses, cut.pattern.sparsity, cut.sizing)


def shrink_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path | None,
    plan: Plan,
    how: Cut,
    announce: Announce = quietly,
    *,
    further: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device = devices.CPU,
    hold: Place = "auto",
    journal: Journal[CutBlock] | None = None,
) -> list[CutBlock]:
    """Cut heads and channels out of a checkpoint as planned; see `cut.shrink`."""
    return shrinking.shrink(
        source,
        ids,
        destination,
        plan,
        how.fit,
        how.tuning,
        further=further,
        dtype=dtype,
        device=device,
        hold=hold,
        journal=journal,
        on_progress=announce(f"Cut {plan.removed:.1%} out of the blocks and refit the rest"),
    )


def quantise_checkpoint(
    folder: Path,
    ids: Tensor,
    codes: Path,
    request: PruneRequest,
    grid: Grid,
    announce: Announce = quietly,
    *,
    further: Tensor | None = None,
    journal: Journal[QuantisedBlock] | None = None,
) -> Quantisation:
    """Quantise the model in a folder and replace it by the quantised model.

    All ranks work together, and rank 0 writes the model and its codes. Blocks are tuned with as
    many steps as after pruning, on the same text.
    """
    first = current().is_first
    quantised = folder.with_name(f"{folder.name}-quantised")
    if first:
        quantised.mkdir()
        codes.mkdir()
    quantisation = quantise_model(
        Checkpoint.open(folder),
        ids,
        quantised if first else None,
        codes if first else None,
        grid,
        tuning=request.how.tuning,
        further=further,
        forward=DTYPES[request.forward],
        device=request.chosen_device,
        hold=request.activations,
        journal=journal,
        on_progress=announce(f"Quantise to {grid}"),
    )
    replace_checkpoint(folder, quantised)
    return quantisation


def check(source: Checkpoint, request: PruneRequest) -> None:
    """Refuse a request that cannot be carried out, as far as configuration and headers show it.

    Raises:
        UsageError: the options do not fit the model.
        ModelError: the model cannot be pruned in this way.
        PlatformError: the device is not available.
    """
    devices.choose(request.device)
    match request.how:
        case Cut(pattern, how, fit, _) if how.drops_blocks:
            shrinking.check(source)
            depth.check(source, pattern.sparsity)
            if source.family.experts is not None:
                experts.check_fit(source, fit)
        case Cut(pattern, how, fit, _):
            shrinking.check(source)
            sizing.check(source, pattern.sparsity, how)
            if source.family.experts is not None:
                experts.check(source, pattern.sparsity, how, fit)
        case Recipe() as recipe:
            patterns = assigned(source, recipe)
            _check_columns(recipe, patterns)
            pruning.check(source, recipe, patterns)
            if recipe.tries_layers:
                sensitive.check(source)
            possible_choices(source, recipe)


def disk_bytes(source: Checkpoint, ids: Tensor, further: Tensor, request: PruneRequest) -> int:
    """Return the disk space that the stage prune takes while it runs, in bytes.

    This counts the pruned model, its later versions and the journals.

    Args:
        source: the dense model.
        ids: int64[count, length], the segments from which statistics are collected.
        further: int64[count, length], the segments used only to tune blocks.
        request: the options of the stage.
    """
    how = request.how
    tokens = ids.numel() + further.numel()
    forward = DTYPES[request.forward]
    activations = activation_bytes(source, tokens, forward, with_dense=how.walks_dense)
    if how.surveys:
        activations += activation_bytes(source, ids.numel(), torch.float32, with_dense=False)
    models = 2
    if request.grid is not None:  # the quantised model and its journal, beside the pruned model
        activations += activation_bytes(source, tokens, forward, with_dense=True)
        models += 2
    if request.recover:  # the trained model, beside the model that it is trained from
        models += 1
    return models * source.bytes_in(request.dtype) + activations


def memory_of(
    source: Checkpoint, ids: Tensor, further: int, request: PruneRequest, device: torch.device
) -> Memory:
    """Return the peak memory of the stage; see `forecast.memory`."""
    held = _memory_of_pruning(source, ids, further, request, device)
    if request.grid is None:
        return held
    quantising = memory.of_quantising(
        source,
        ids,
        request.how.tuning,
        further=further,
        forward=DTYPES[request.forward],
        device=device,
        place=request.activations,
    )
    return memory.largest(held, quantising)


def _memory_of_pruning(
    source: Checkpoint, ids: Tensor, further: int, request: PruneRequest, device: torch.device
) -> Memory:
    match request.how:
        case Cut(fit=fit, tuning=tuning, sizing=widths):
            held = memory.of_cutting(
                source,
                ids,
                fit,
                tuning,
                further=further,
                device=device,
                place=request.activations,
            )
            trials = [memory.of_trials(source, device)] if widths.drops_blocks else []
            return memory.largest(held, *trials)
        case Recipe() as recipe:
            return memory.of_recipe(
                source,
                ids,
                pruning.short_names(source, assigned(source, recipe)),
                recipe,
                further=further,
                dtype=DTYPES.get(request.dtype),
                device=device,
                place=request.activations,
            )


def _check_columns(recipe: Recipe, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a sparsity file with structured patterns if the recipe's own is not structured.

    Raises:
        UsageError: the file has such a pattern.
    """
    columns = [name for name, its in patterns.items() if isinstance(its, Structured)]
    if columns and not isinstance(recipe.pattern, Structured):
        raise UsageError(
            f"{recipe.layers.sparsity_file}: {columns[0]} is {patterns[columns[0]]}, which "
            "is not a pattern for a single layer: heads and channels are cut out of every "
            "layer that produces or reads them",
            fix="use n:m or unstructured:FRACTION for it; or --pattern structured:FRACTION with "
            "--keep-shape, for columns of zeros",
        )
