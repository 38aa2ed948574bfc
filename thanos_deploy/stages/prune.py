"""The stage prune: a sparse or smaller checkpoint, and a report of each layer."""

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import Json, decode, encode
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.segments import every_segment
from thanos_deploy.calibration.sizes import activation_bytes
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import UsageError
from thanos_deploy.forecast import memory
from thanos_deploy.forecast.memory import Memory
from thanos_deploy.machine import devices, environment
from thanos_deploy.model import assignment
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.model.parts import part_bytes
from thanos_deploy.pattern import Pattern, Structured
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning import layers as pruning
from thanos_deploy.pruning import owl
from thanos_deploy.pruning import recover as recovering
from thanos_deploy.pruning.owl import Outliers
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.pruning.recipe import Owl, Recipe
from thanos_deploy.pruning.result import (
    PRUNE,
    PartBytes,
    PrunedBlock,
    PruneInputs,
    PruneOptions,
    PruneResult,
    Quantisation,
    Recovery,
    WidthsSummary,
)
from thanos_deploy.shrink import cut as shrinking
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.options import Cut, Fit
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Losses, Plan
from thanos_deploy.shrink.survey import survey
from thanos_deploy.stages import summary
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import calibration


def prune_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    recipe: Recipe,
    announce: Announce = quietly,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = devices.CPU,
    hold: Place = "auto",
    survey: Journal[Outliers] | None = None,
    journal: Journal[PrunedBlock] | None = None,
) -> list[PrunedBlock]:
    """Prune a checkpoint by a recipe, on given calibration tokens; see `layers.prune`.

    Where a walk before decides what each block loses, `survey` is the journal of that.
    """
    patterns: Mapping[str, Pattern] = assigned(source, recipe)
    if recipe.owl is not None:
        outliers = owl.survey(
            source,
            ids,
            patterns,
            recipe.owl,
            device=device,
            hold=hold,
            journal=survey,
            on_progress=announce("Count the outliers of each block"),
        )
        patterns = _allocated(source, recipe.owl, recipe.pattern.sparsity, patterns, outliers)
    return pruning.prune(
        source,
        ids,
        destination,
        recipe,
        patterns=patterns,
        dtype=dtype,
        device=device,
        hold=hold,
        journal=journal,
        on_progress=announce(f"Prune to {recipe.pattern} with {recipe.method}"),
    )


def assigned(source: Checkpoint, recipe: Recipe) -> dict[str, Pattern]:
    """What is asked of every linear layer that is to be pruned, by its full name."""
    return assignment.assign(
        source.linears,
        recipe.pattern,
        include=recipe.layers.include,
        ignore=recipe.layers.ignore,
        file=_sparsity_file(recipe),
    )


def _sparsity_file(recipe: Recipe) -> assignment.SparsityFile | None:
    if recipe.layers.sparsity_file is None:
        return None
    return assignment.read_file(Path(recipe.layers.sparsity_file).expanduser())


def _allocated(
    source: Checkpoint,
    how: Owl,
    sparsity: float,
    layers: Collection[str],
    outliers: Sequence[Outliers],
) -> Mapping[str, Pattern]:
    """The pattern of every layer, by how many outliers each block has."""
    shapes = pruning.linear_shapes(source)
    blocks = [
        {name: math.prod(shapes[name]) for name in block.full_names if name in layers}
        for block in source.blocks
    ]
    return owl.allocate([block.ratio for block in outliers], blocks, sparsity, how)


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
    """What each block would lose at which widths; the same for every fraction to remove."""
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


def plan_widths(source: Checkpoint, losses: Sequence[Losses], cut: Cut) -> Plan:
    """How wide the blocks of a shrunk model will be."""
    return sizing.plan(source, losses, cut.pattern.sparsity, cut.sizing)


def shrink_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    plan: Plan,
    fit: Fit,
    announce: Announce = quietly,
    *,
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
        fit,
        dtype=dtype,
        device=device,
        hold=hold,
        journal=journal,
        on_progress=announce(f"Cut {plan.removed:.1%} out of the blocks and refit the rest"),
    )


def recover_checkpoint(
    source: Checkpoint,
    text: Text,
    folder: Path,
    request: PruneRequest,
    announce: Announce = quietly,
) -> Recovery:
    """Train the pruned model in a folder, in place of itself, on any part of a text."""
    tokenizer = load_tokenizer(source.folder)
    trained = folder.with_name(f"{folder.name}-trained")
    trained.mkdir()
    recovery = recovering.recover(
        Checkpoint.open(folder),
        source,
        every_segment(text, tokenizer, length=request.data.seqlen),
        trained,
        count=request.recover,
        seed=request.data.seed,
        device=request.chosen_device,
        on_progress=announce(f"Train the remaining weights on {request.recover} segments"),
    )
    shutil.rmtree(folder)
    trained.rename(folder)
    return recovery


def quantise_checkpoint(
    folder: Path,
    ids: Tensor,
    codes: Path,
    request: PruneRequest,
    announce: Announce = quietly,
) -> Quantisation | None:
    """Quantise the model in a folder, in place of itself, if that is asked for."""
    grid = request.grid
    if grid is None:
        return None
    quantised = folder.with_name(f"{folder.name}-quantised")
    quantised.mkdir()
    codes.mkdir()
    quantisation = quantise_model(
        Checkpoint.open(folder),
        ids,
        quantised,
        codes,
        grid,
        forward=DTYPES[request.forward],
        device=request.chosen_device,
        hold=request.activations,
        on_progress=announce(f"Quantise to {grid}"),
    )
    shutil.rmtree(folder)
    quantised.rename(folder)
    return quantisation


def prune(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Prune the model into the bundle, unless that is done."""
    source = dense.checkpoint(announce)
    check(source, request)
    how, device, dtype = request.how, request.chosen_device, DTYPES.get(request.dtype)
    own = _sparsity_file(how) if isinstance(how, Recipe) else None
    text, ids, frame = calibration(source, request.data)

    memory.require(memory_of(source, ids, request, device), device)

    inputs = PruneInputs(
        dense.source.sha256, text.sha256, frame.ids, None if own is None else own.sha256
    )
    owner = {**request.to_json(), **encode(inputs), **_versions(device)}

    def produce(folder: Path) -> PruneResult:
        model, kept = folder / layout.MODEL, bundle.journal(layout.PRUNE)
        model.mkdir()
        activations = activation_bytes(
            source, ids.numel(), DTYPES[request.forward], with_dense=how.walks_dense
        )
        if how.surveys:
            activations += activation_bytes(source, ids.numel(), torch.float32, with_dense=False)
        needed = 2 * source.bytes_in(request.dtype) + activations  # the model, and its journals
        files.require_disk(folder, needed - files.size(kept))
        blocks: Sequence[PrunedBlock | CutBlock]
        widths: WidthsSummary | None
        surveyed: Journal[Losses] | Journal[Outliers] | None
        match how:
            case Cut():
                surveyed = Journal(kept / "survey", owner, Losses)
                losses = survey_blocks(
                    source,
                    ids,
                    how,
                    announce,
                    device=device,
                    hold=request.activations,
                    journal=surveyed,
                )
                plan = plan_widths(source, losses, how)
                blocks = cut = shrink_checkpoint(
                    source,
                    ids,
                    model,
                    plan,
                    how.fit,
                    announce,
                    dtype=dtype,
                    device=device,
                    hold=request.activations,
                    journal=Journal(kept / "blocks", owner, CutBlock),
                )
                summed, widths = summary.of_cuts(cut), summary.of_widths(plan)
            case Recipe():
                surveyed = Journal(kept / "survey", owner, Outliers) if how.surveys else None
                blocks = pruned = prune_checkpoint(
                    source,
                    ids,
                    model,
                    how,
                    announce,
                    dtype=dtype,
                    device=device,
                    hold=request.activations,
                    survey=surveyed,
                    journal=Journal(kept / "blocks", owner, PrunedBlock),
                )
                summed, widths = summary.of_layers(pruned, how), None
        files.write_record(folder / layout.LAYERS, blocks)
        recovery = (
            recover_checkpoint(source, text, model, request, announce) if request.recover else None
        )
        codes = folder / layout.CODES
        quantisation = quantise_checkpoint(model, ids, codes, request, announce)

        def spent(activity: str) -> float:
            return sum((block.seconds.get(activity, 0.0) for block in blocks), 0.0)

        return PruneResult(
            **{field.name: getattr(summed, field.name) for field in fields(summed)},
            widths=widths,
            recovery=recovery,
            quantisation=quantisation,
            frame=frame,
            survey_seconds=sum(sum(one.seconds.values()) for one in surveyed.reports)
            if surveyed
            else None,
            collect_seconds=spent("collect"),
            solve_seconds=spent("solve"),
            tune_seconds=spent("tune"),
            forward_seconds=spent("forward"),
            journal_seconds=spent("journal"),
            device=devices.describe(device),
            peak_memory_bytes=environment.peak_memory_bytes(),
            dense_bytes=source.bytes_in("auto"),
            parts=PartBytes(part_bytes(source), part_bytes(Checkpoint.open(model))),
            discovered=source.family.discovered,
        )

    return bundle.run(
        PRUNE,
        produce,
        options=decode(PruneOptions, request.to_json()),
        inputs=inputs,
        overwrite=overwrite,
    )


def check(source: Checkpoint, request: PruneRequest) -> None:
    """Refuse what `prune` would refuse, as far as configuration and headers show it.

    Raises:
        UsageError: the options do not fit the model.
        ModelError: the model cannot be pruned so.
        PlatformError: the device is not there.
    """
    devices.choose(request.device)
    match request.how:
        case Cut(pattern, how, _):
            shrinking.check(source)
            sizing.check(source, pattern.sparsity, how)
        case Recipe() as recipe:
            patterns = assigned(source, recipe)
            _check_columns(recipe, patterns)
            pruning.check(source, recipe, patterns)


def memory_of(
    source: Checkpoint, ids: Tensor, request: PruneRequest, device: torch.device
) -> Memory:
    """What the stage will hold at once."""
    match request.how:
        case Cut(fit=fit):
            return memory.of_cutting(source, ids, fit, device=device, place=request.activations)
        case Recipe() as recipe:
            patterns = assigned(source, recipe)
            return memory.of_pruning(
                source,
                ids,
                pruning.short_names(source, patterns),
                recipe.walk,
                forward=DTYPES[recipe.forward_on(device)],
                dtype=DTYPES.get(request.dtype),
                device=device,
                place=request.activations,
            )


def _check_columns(recipe: Recipe, patterns: Mapping[str, Pattern]) -> None:
    """Refuse a file that asks for columns of zeros where the rest has none.

    Raises:
        UsageError: it does.
    """
    columns = [name for name, its in patterns.items() if isinstance(its, Structured)]
    if columns and not isinstance(recipe.pattern, Structured):
        raise UsageError(
            f"{recipe.layers.sparsity_file}: {columns[0]} is {patterns[columns[0]]}, which is no "
            "pattern of one layer: heads and channels go from every layer that makes or reads them",
            fix="use n:m or unstructured:FRACTION for it; or --pattern structured:FRACTION with "
            "--keep-shape, for columns of zeros",
        )


def _versions(device: torch.device) -> Json:
    """What else the last bit of a result depends on: code, device, number of threads."""
    made_with = environment.describe()
    return {
        "thanos-deploy": made_with.thanos_deploy,
        "libraries": dict(made_with.libraries),
        "processor": made_with.processor,
        "threads": torch.get_num_threads(),
        **({} if device.type == "cpu" else {"gpu": devices.describe(device)}),
    }
