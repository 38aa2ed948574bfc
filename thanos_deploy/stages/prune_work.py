"""The work of the stage prune, described identically on every rank, and its results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.forecast import memory_check
from thanos_deploy.forecast.memory import Memory
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.progress import Announce
from thanos_deploy.pruning.budget import Choices
from thanos_deploy.pruning.owl import Outliers
from thanos_deploy.pruning.quantise import QuantisedBlock
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import (
    LayersSummary,
    PrunedBlock,
    PruneInputs,
    Quantisation,
    Recovery,
    WidthsSummary,
)
from thanos_deploy.pruning.sensitivity import Sensitivity
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.shards import Layout
from thanos_deploy.ranks.start import same_everywhere
from thanos_deploy.shrink import depth
from thanos_deploy.shrink.depth import Removal
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Losses
from thanos_deploy.stages import summary
from thanos_deploy.stages.checkpoints import (
    check,
    disk_bytes,
    memory_of,
    plan_widths,
    prune_checkpoint,
    quantise_checkpoint,
    shrink_checkpoint,
    survey_blocks,
    survey_depth,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.patterns import choices_of, measured_hash, sparsity_file
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import Calibration, calibration
from thanos_deploy.stages.training import Journals, recover_checkpoint, train_scales_checkpoint

# Names of the folders with the journals of the walks.
WALKS = SURVEY, BLOCKS, QUANTISED = "survey", "blocks", "quantised"

# Key of the number of threads in `Work.owner`.
THREADS = "threads"


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of pruning or shrinking a model.

    Attributes:
        blocks: report on each block.
        summed: summary of these reports.
        widths: the widths of the blocks before and after cutting; None if nothing was cut out.
        survey: journal of the walk that decided what each block loses; None without such a walk.
        choices: which layers stayed dense under a budget or `keep_dense`; None without both.
    """

    blocks: Sequence[PrunedBlock | CutBlock]
    summed: LayersSummary
    widths: WidthsSummary | None
    survey: Journal[Losses] | Journal[Removal] | Journal[Outliers] | Journal[Sensitivity] | None
    choices: Choices | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The work of the stage prune, the same on every rank.

    Attributes:
        source: the dense model.
        request: the options of the user.
        calibration: the calibration text and its segments.
        memory: peak memory of the work, in addition to what the process holds already.
        inputs: hashes of the files and texts that are read.
        owner: everything that the result depends on; a journal of other work is discarded.
    """

    source: Checkpoint
    request: PruneRequest
    calibration: Calibration
    memory: Memory
    inputs: PruneInputs
    owner: Json

    @classmethod
    def of(cls, dense: Dense, request: PruneRequest, announce: Announce) -> "Work":
        """Read the model and the calibration text, and refuse ranks that differ from each other.

        Raises:
            DeployError: see `check`, `calibration`, `same_everywhere` and `Layout.require`.
        """
        source = dense.checkpoint(announce)
        check(source, request)
        own, measured = None, None
        if isinstance(request.how, Recipe):
            own, measured = sparsity_file(request.how), measured_hash(request.how)
        device, data = request.chosen_device, request.data
        further = request.how.tuning.further(data.nsamples)
        # Impossible sizes are clamped here, and refused when the text is cut.
        sizes = max(1, data.nsamples), max(1, min(data.seqlen, source.max_positions))
        segments = torch.empty(sizes, dtype=torch.int64, device="meta")
        needed = memory_of(source, segments, further, request, device)
        memory_check.require(needed, device)
        taken = calibration(source, data, further)
        Layout.of(*taken.ids.shape).require(current().size)
        inputs = PruneInputs(
            dense.source.sha256,
            taken.text.sha256,
            taken.frame.ids,
            None if own is None else own.sha256,
            measured,
        )
        owner = {
            **request.to_json(),
            **encode(inputs),
            **versions(request.chosen_device),
        }
        same_everywhere(owner)
        return cls(source, request, taken, needed, inputs, owner)

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.request.chosen_device

    @property
    def tune_segments(self) -> int:
        """Number of segments on which blocks are tuned; 0 without tuning."""
        tuned = self.request.how.tuning.tune_steps > 0
        return len(self.calibration.ids) + len(self.calibration.further) if tuned else 0

    @property
    def disk_bytes(self) -> int:
        """Disk space that the model and the journals take, in bytes."""
        taken = self.calibration
        return disk_bytes(self.source, taken.ids, taken.further, self.request)

    def run(self, model: Path | None, kept: Path, announce: Announce) -> Pruned:
        """Prune or shrink the model, together with the other ranks.

        Args:
            model: an empty folder for the pruned model; None on ranks that write nothing.
            kept: folder of the journals.
            announce: told of each task.
        """
        source, how, owner = self.source, self.request.how, self.owner
        ids, further = self.calibration.ids, self.calibration.further
        device, dtype = self.device, DTYPES.get(self.request.dtype)
        match how:
            case Cut():
                losses: Journal[Losses] | Journal[Removal]
                if how.sizing.drops_blocks:
                    losses = Journal(kept / SURVEY, owner, Removal)
                    removals = survey_depth(
                        source, ids, how, announce, device=device, journal=losses
                    )
                    plan = depth.plan(source, removals)
                else:
                    losses = Journal(kept / SURVEY, owner, Losses)
                    surveyed = survey_blocks(
                        source,
                        ids,
                        how,
                        announce,
                        device=device,
                        hold=self.request.activations,
                        journal=losses,
                    )
                    plan = plan_widths(source, surveyed, how)
                cut = shrink_checkpoint(
                    source,
                    ids,
                    model,
                    plan,
                    how,
                    announce,
                    further=further,
                    dtype=dtype,
                    device=device,
                    hold=self.request.activations,
                    journal=Journal(kept / BLOCKS, owner, CutBlock),
                )
                return Pruned(cut, summary.of_cuts(cut), summary.of_widths(plan), losses)
            case Recipe():
                outliers = sensitivity = None
                if how.owl is not None:
                    outliers = Journal(kept / SURVEY, owner, Outliers)
                elif how.tries_layers:
                    sensitivity = Journal(kept / SURVEY, owner, Sensitivity)
                pruned = prune_checkpoint(
                    source,
                    ids,
                    model,
                    how,
                    announce,
                    further=further,
                    dtype=dtype,
                    device=device,
                    hold=self.request.activations,
                    outliers=outliers,
                    sensitivity=sensitivity,
                    journal=Journal(kept / BLOCKS, owner, PrunedBlock),
                )
                survey = sensitivity if outliers is None else outliers
                choices = choices_of(source, how, sensitivity.reports) if sensitivity else None
                return Pruned(pruned, summary.of_layers(pruned, how), None, survey, choices)

    def finish(
        self, folder: Path, kept: Path, announce: Announce
    ) -> tuple[Recovery | None, Quantisation | None]:
        """Train the remaining weights and quantise the model, as requested; all ranks together.

        Args:
            folder: folder of the stage, to which rank 0 writes the pruned model.
            kept: folder of the journals.
            announce: told of each task.
        """
        request, model, taken = self.request, folder / layout.MODEL, self.calibration
        current().barrier()  # until rank 0 has written the model
        recovery, journals = None, Journals(kept, self.owner)
        if request.recover:
            recovery = recover_checkpoint(
                self.source, taken.text, model, request, announce, journals
            )
        if request.grid is None:
            return recovery, None
        codes = folder / layout.CODES
        quantisation = quantise_checkpoint(
            model,
            taken.ids,
            codes,
            request,
            request.grid,
            announce,
            further=taken.further,
            journal=Journal(kept / QUANTISED, self.owner, QuantisedBlock),
        )
        if request.recover:
            trained = train_scales_checkpoint(
                self.source, taken.text, model, codes, request, announce, journals
            )
            quantisation = replace(quantisation, trained=trained)
        return recovery, quantisation


def versions(device: torch.device) -> Json:
    """Return the versions, the device and the number of threads, on which results also depend."""
    made_with = environment.describe()
    return {
        "thanos-deploy": made_with.thanos_deploy,
        "libraries": dict(made_with.libraries),
        "processor": made_with.processor,
        THREADS: torch.get_num_threads(),
        **({} if device.type == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
    }
