"""Cut attention heads and feed-forward channels out of a model, for good, and refit the rest.

In every block: collect statistics, decide which heads stay and refit the layer that reads them,
cut the layers that make them; collect again with the smaller attention, do the same with the
feed-forward channels. Later blocks see the smaller ones. Cutting a producer changes no result,
because nothing reads what it made any more.

    survey        what every block would lose at which widths: one walk through the dense model
    sizing.plan   the widths of every block, chosen by that
    shrink        the walk that cuts, and writes an ordinary model folder of smaller tensors
"""

import dataclasses
import json
import logging
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.bundle import files
from thanos_deploy.calibration.blocks import collect, collect_relative
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.walk import Visit, visits
from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import products_in
from thanos_deploy.model import widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.families import Family, Heads
from thanos_deploy.model.linear import keep_outputs, matrix, replace
from thanos_deploy.model.weights import WeightsCopy
from thanos_deploy.model.widths import Widths
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Losses, Plan, channel_steps, layouts
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor, retarget
from thanos_deploy.solver.layer import LayerProblem, relative_error

logger = logging.getLogger(__name__)


def check(checkpoint: Checkpoint) -> None:
    """Refuse a model whose blocks cannot be cut, before anything is computed.

    Raises:
        ModelError: queries, keys and values are not laid out as the family describes, or the
            blocks already differ.
    """
    family, size = checkpoint.family, checkpoint.head_size
    if routed := [block.prefix.rstrip(".") for block in checkpoint.blocks if block.routed]:
        raise ModelError(
            f"{checkpoint.folder}: {routed[0]} has experts, which cannot be cut",
            fix="prune it to a pattern that keeps shapes, such as --pattern 2:4",
        )
    if len(set(checkpoint.widths)) > 1:
        raise ModelError(
            f"{checkpoint.folder}: its blocks have different widths already",
            fix="shrink the model that it was made from, once, by the whole fraction",
        )
    width = checkpoint.widths[0]
    for name, rows in zip(
        family.heads.producers, widths.producer_rows(family, width, size), strict=True
    ):
        weight = checkpoint.stored_name(f"{family.blocks}.0.{name}.weight")
        found = checkpoint.weights.shapes[weight][1 if family.transposed else 0]
        if found != rows:
            raise ModelError(
                f"{weight}: {found} rows of queries, keys and values; {rows} were expected for "
                f"{width.heads} heads and {width.kv_heads} key-value heads of {size}",
                fix="prune it with --keep-shape, or describe its layout in "
                "thanos_deploy/model/families.py",
            )


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    multiple: int | None = None,
    damping: float = 0.01,
    damping_mode: str = "mean",
    device: torch.device = CPU,
    journal: Journal[Losses] | None = None,
    on_progress: OnProgress = silent,
) -> list[Losses]:
    """What every block of the dense model would lose at which widths.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        multiple: see `candidates`.
        damping, damping_mode: see `thanos_deploy.solver.hessian.factor`.
        device: where each block is while it is surveyed.
        journal: see `layers.prune`.
        on_progress: told of every finished block.

    Raises:
        HessianError: the calibration statistics cannot be used.
    """
    family, count = checkpoint.family, len(checkpoint.widths)
    losses = [] if journal is None else journal.reports
    on_progress(len(losses), count)
    for visit in visits(checkpoint, segments, journal=journal, device=device):
        width = checkpoint.widths[visit.index]
        consumers = [family.heads.consumer, family.channels.consumer]
        with visit.clock.measure("collect"):
            statistics = collect_relative(visit.walk, consumers)
        with visit.clock.measure("solve"):
            fitted = {}
            for name in consumers:
                layer = _Layer(visit, name, statistics[name])
                factored = factor(layer.problem, damping, damping_mode)
                fitted[name] = Elimination(layer.problem.weight, factored)
            heads = {}
            for fewer_keys in (False, True):  # two ways, on each of which the heads go one by one
                trial = deepcopy(fitted[family.heads.consumer])
                for layout in layouts(width):
                    if (layout[1] < width.kv_heads) == fewer_keys:
                        trial.drop_heads((width.heads, width.kv_heads), keep=layout)
                        heads[layout] = trial.loss / segments.numel()
            by_count = fitted[family.channels.consumer].channel_losses() / segments.numel()
        channels = {
            left: by_count[width.channels - left].item()
            for left in (width.channels, *channel_steps(width.channels, multiple))
        }
        losses.append(Losses(heads, channels, visit.clock.seconds))
        on_progress(visit.index + 1, count)
    return losses


def shrink(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path,
    *,
    plan: Plan,
    damping: float = 0.01,
    damping_mode: str = "mean",
    dense_target: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    journal: Journal[CutBlock] | None = None,
    on_progress: OnProgress = silent,
) -> list[CutBlock]:
    """Cut a model down to a plan and write it: an ordinary model folder where the plan is stock.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder.
        plan: the widths of each block.
        damping, damping_mode: see `thanos_deploy.solver.hessian.factor`.
        dense_target: how far every linear layer, cut or not, aims at the output that it has in the
            dense model; see `hessian.retarget`.
        dtype: what to store, or None to keep each tensor's own.
        device: where each block is while it is cut.
        journal: see `layers.prune`.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing, have NaN, or do not have the layout of their family.
        HessianError: the calibration statistics cannot be used.
    """
    check(checkpoint)
    family = checkpoint.family
    copy_companions(checkpoint.folder, destination, dtype)
    _describe(checkpoint, destination, plan)
    shapes = {
        checkpoint.stored_name(name): tuple(parameter.shape)
        for name, parameter in checkpoint.skeleton(plan.widths).named_parameters()
        if name.startswith(f"{family.blocks}.")
    }
    reports = [] if journal is None else journal.reports
    with (
        torch.no_grad(),
        products_in(torch.float32),
        WeightsCopy(checkpoint.weights, destination, dtype, shapes) as copy,
    ):
        on_progress(len(reports), len(plan.blocks))
        for visit in visits(
            *(checkpoint, segments),
            copy=copy,
            with_dense=dense_target > 0.0,
            journal=journal,
            device=device,
        ):
            with memory_for(f"block {visit.index}"):
                report = cut(
                    *(visit, checkpoint, plan.widths[visit.index]),
                    damping=damping,
                    damping_mode=damping_mode,
                    dense_target=dense_target,
                )
            reports.append(report)
            logger.info(
                "block %d: %d heads, %d channels; errors %.4f and %.4f",
                *(visit.index, report.after.heads, report.after.channels),
                *(report.heads_error, report.channels_error),
            )
            on_progress(visit.index + 1, len(plan.blocks))
    return reports


def cut(
    visit: Visit,
    checkpoint: Checkpoint,
    after: Widths,
    *,
    damping: float,
    damping_mode: str,
    dense_target: float,
) -> CutBlock:
    """Cut one block down to a width, in place; see `shrink`."""
    before = checkpoint.widths[visit.index]
    cutter = _Cutter(
        *(visit, checkpoint.family, before, after),
        damping=damping,
        damping_mode=damping_mode,
        dense_target=dense_target,
    )
    cutter.run(checkpoint.head_size)
    return CutBlock(
        before=before,
        after=after,
        heads=tuple(cutter.heads.tolist()),
        channels=tuple(cutter.channels.tolist()),
        heads_error=cutter.heads_error,
        channels_error=cutter.channels_error,
        damping=cutter.damping,
        seconds=visit.clock.seconds,
    )


class _Layer:
    """A linear layer on its way to another weight, and perhaps to fewer inputs.

    Attributes:
        problem: the weight that it aims at and the Hessian of its input, in float64; around the
            means where it has a bias, which takes over what is lost on average.
    """

    def __init__(
        self, visit: Visit, name: str, statistics: Statistics, dense_target: float = 0.0
    ) -> None:
        self._visit, self._name = visit, name
        self._layer = visit.block.get_submodule(name)
        self._bias = getattr(self._layer, "bias", None)
        used = statistics if self._bias is None else statistics.centred()
        weight = matrix(self._layer).double()
        problem = LayerProblem(weight, used.hessian.double(), visit.prefix + name)
        self._mean = wanted = statistics.total.double() / statistics.mass
        if used.cross is not None:
            assert statistics.dense_total is not None
            dense = statistics.dense_total.double() / statistics.mass
            wanted = wanted + dense_target * (dense - wanted)
            aimed = retarget(problem, used.cross.double(), dense_target)
            problem = dataclasses.replace(problem, weight=aimed)
        self.problem = problem
        self._output = weight @ wanted

    def write(self, weight: Tensor, left: Tensor) -> float:
        """Give the layer a new weight, on the inputs that are left; return its relative error.

        Args:
            weight: float64[rows, cols], zero where an input is gone.
            left: bool[cols].
        """
        rounded = self._visit.stored(f"{self._name}.weight", weight)
        bias = None
        if self._bias is not None:
            change = self._output - rounded.double() @ self._mean
            bias = self._visit.stored(f"{self._name}.bias", self._bias + change.float()).float()
        replace(self._layer, rounded[:, left].float(), bias)
        return relative_error(self.problem.weight, rounded.double(), self.problem.hessian)


class _Cutter:
    """Cuts one block.

    Attributes:
        heads, channels: int64[count], those that stay.
        heads_error, channels_error: relative errors of the layers that read them.
        damping: the most that was used.
    """

    def __init__(
        self,
        visit: Visit,
        family: Family,
        before: Widths,
        after: Widths,
        *,
        damping: float,
        damping_mode: str,
        dense_target: float,
    ) -> None:
        self._visit, self._family = visit, family
        self._before, self._after = before, after
        self._damping, self._mode, self._dense_target = damping, damping_mode, dense_target
        self.heads, self.channels = torch.arange(before.heads), torch.arange(before.channels)
        self.heads_error = self.channels_error = self.damping = 0.0

    def run(self, size: int) -> None:
        """Layer by layer in the order of the forward pass; `size` is that of a head."""
        before, after = self._before, self._after
        layouts_differ = (before.heads, before.kv_heads) != (after.heads, after.kv_heads)
        for group in self._family.inputs:
            if group == (self._family.heads.consumer,):
                if layouts_differ:
                    self._cut_heads(size)
                    continue
            elif group == (self._family.channels.consumer,) and before.channels != after.channels:
                self._cut_channels()
                continue
            if self._dense_target:
                self._aim(group)

    def _aim(self, group: tuple[str, ...]) -> None:
        """Bring the outputs of layers that lose no input nearer to the dense model's."""
        statistics = self._collect(group[0])
        with self._visit.clock.measure("solve"):
            for name in group:
                layer = _Layer(self._visit, name, statistics, self._dense_target)
                weight = layer.problem.weight
                layer.write(weight, torch.ones_like(weight[0], dtype=torch.bool))

    def _cut_heads(self, size: int) -> None:
        heads, before, after = self._family.heads, self._before, self._after
        layer, fitted = self._start(heads.consumer)
        with self._visit.clock.measure("solve"):
            self.heads = fitted.drop_heads(
                (before.heads, before.kv_heads), keep=(after.heads, after.kv_heads)
            )
            self.heads_error = layer.write(fitted.weight, fitted.left)
            rows = head_rows(heads, self.heads, before, size)
            for name, kept in zip(heads.producers, rows, strict=True):
                keep_outputs(self._visit.block.get_submodule(name), kept)
            widths.fit_attention(self._visit.block, self._family, after, size)

    def _cut_channels(self) -> None:
        layer, fitted = self._start(self._family.channels.consumer)
        with self._visit.clock.measure("solve"):
            fitted.drop_channels(self._after.channels)
            self.channels = fitted.left.nonzero().flatten()
            self.channels_error = layer.write(fitted.weight, fitted.left)
            for name in self._family.channels.producers:
                keep_outputs(self._visit.block.get_submodule(name), self.channels)

    def _start(self, name: str) -> tuple[_Layer, Elimination]:
        statistics = self._collect(name)
        with self._visit.clock.measure("solve"):
            layer = _Layer(self._visit, name, statistics, self._dense_target)
            factored = factor(layer.problem, self._damping, self._mode)
            self.damping = max(self.damping, factored.damping)
            return layer, Elimination(layer.problem.weight, factored)

    def _collect(self, name: str) -> Statistics:
        with self._visit.clock.measure("collect"):
            return collect(self._visit.walk, [name], self._visit.dense)[name]


def head_rows(heads: Heads, kept: Tensor, before: Widths, size: int) -> list[Tensor]:
    """The rows of each producer that belong to the query heads that stay, and to their keys.

    Args:
        heads: how the family lays them out.
        kept: int64[count], query heads, rising.
        before: widths before the cut.
        size: channels of one head.

    Returns:
        int64 each, in the order of `heads.producers`.
    """

    def rows(numbers: Tensor, length: int) -> Tensor:
        within = torch.arange(length, device=numbers.device)
        return (numbers[:, None] * length + within).flatten()

    match heads.layout:
        case "separate":
            kv_heads = torch.unique(kept // (before.heads // before.kv_heads))
            return [rows(kept, size), rows(kv_heads, size), rows(kv_heads, size)]
        case "by head":
            return [rows(kept, 3 * size)]
        case "by part":
            part = before.heads * size
            return [torch.cat([start + rows(kept, size) for start in (0, part, 2 * part)])]


def _describe(checkpoint: Checkpoint, destination: Path, plan: Plan) -> None:
    """Put the widths where a loader finds them."""
    entries = widths.describe(checkpoint.config, checkpoint.family, plan.widths)
    (destination / widths.FILE).unlink(missing_ok=True)
    if entries is None:
        widths.declare(destination, plan.widths)
    else:
        path = destination / "config.json"
        files.write_json(path, {**json.loads(path.read_bytes()), **entries})
