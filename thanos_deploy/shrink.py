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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy import artifact, widths
from thanos_deploy.calibrate import Statistics, collect, collect_relative
from thanos_deploy.checkpoint import Checkpoint, WeightsCopy, copy_companions
from thanos_deploy.elimination import Elimination
from thanos_deploy.errors import ModelError
from thanos_deploy.families import Family, Heads
from thanos_deploy.hessian import factor, retarget
from thanos_deploy.layer import LayerProblem, relative_error
from thanos_deploy.linear import keep_outputs, matrix, replace
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.sizing import Losses, Plan, channel_steps, layouts
from thanos_deploy.walk import Visit, visits
from thanos_deploy.widths import Widths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block as it was cut.

    Attributes:
        before, after: its widths.
        heads: the query heads that stayed, by their numbers in the dense model.
        channels: the feed-forward channels that stayed, the same.
        heads_error, channels_error: fraction of the energy of the output that the layer aims at,
            on the calibration data, that the refitted layer misses.
        damping: the most that was used.
        seconds: time by activity: "collect", "solve", "forward"; see `prune.BlockReport`.
    """

    before: Widths
    after: Widths
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    heads_error: float
    channels_error: float
    damping: float
    seconds: Mapping[str, float]


def check(checkpoint: Checkpoint) -> None:
    """Refuse a model whose blocks cannot be cut, before anything is computed.

    Raises:
        ModelError: queries, keys and values are not laid out as the family describes, or the
            blocks already differ.
    """
    family, size = checkpoint.family, checkpoint.head_size
    if len(set(checkpoint.widths)) > 1:
        raise ModelError(
            f"{checkpoint.folder}: its blocks have different widths already",
            fix="shrink the model that it was made from, once, by the whole fraction",
        )
    width, base = checkpoint.widths[0], family.blocks.partition(".")[0]
    for name, rows in zip(
        family.heads.producers, widths.producer_rows(family, width, size), strict=True
    ):
        weight = checkpoint.stored_name(f"{family.blocks}.0.{name}.weight", base)
        found = checkpoint.weights.shapes[weight][1 if family.transposed else 0]
        if found != rows:
            raise ModelError(
                f"{weight}: {found} rows of queries, keys and values; {rows} were expected for "
                f"{width.heads} heads and {width.kv_heads} key-value heads of {size}",
                fix="prune it with --keep-shape, or describe its layout in "
                "thanos_deploy/families.py",
            )


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    multiple: int | None = None,
    damping: float = 0.01,
    damping_mode: str = "mean",
    on_progress: OnProgress = silent,
) -> list[Losses]:
    """What every block of the dense model would lose at which widths.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        multiple: see `candidates`.
        damping, damping_mode: see `thanos_deploy.hessian.factor`.
        on_progress: told of every finished block.

    Raises:
        HessianError: the calibration statistics cannot be used.
    """
    family, count = checkpoint.family, len(checkpoint.widths)
    losses = []
    on_progress(0, count)
    for visit in visits(checkpoint, segments):
        width = checkpoint.widths[visit.index]
        consumers = [family.heads.consumer, family.channels.consumer]
        statistics = collect_relative(visit.walk, consumers)
        fits = [
            _Fit(visit, name, statistics[name], damping=damping, damping_mode=damping_mode)
            for name in consumers
        ]
        heads = {}
        for layout in layouts(width):
            trial = fits[0].elimination()
            trial.drop_heads((width.heads, width.kv_heads), keep=layout)
            heads[layout] = trial.loss / segments.numel()
        by_count = fits[1].elimination().channel_losses() / segments.numel()
        channels = {
            left: by_count[width.channels - left].item()
            for left in (width.channels, *channel_steps(width.channels, multiple))
        }
        losses.append(Losses(heads, channels))
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
    on_progress: OnProgress = silent,
) -> list[BlockReport]:
    """Cut a model down to a plan and write it: an ordinary model folder where the plan is stock.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder.
        plan: the widths of each block.
        damping, damping_mode: see `thanos_deploy.hessian.factor`.
        dense_target: see `prune.prune`.
        dtype: what to store, or None to keep each tensor's own.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing, have NaN, or do not have the layout of their family.
        HessianError: the calibration statistics cannot be used.
    """
    check(checkpoint)
    family, base = checkpoint.family, checkpoint.family.blocks.partition(".")[0]
    copy_companions(checkpoint.folder, destination, dtype)
    _describe(checkpoint, destination, plan)
    shapes = {
        checkpoint.stored_name(name, base): tuple(parameter.shape)
        for name, parameter in checkpoint.skeleton(plan.widths).named_parameters()
        if name.startswith(f"{family.blocks}.")
    }
    reports = []
    with torch.no_grad(), WeightsCopy(checkpoint.weights, destination, dtype, shapes) as copy:
        on_progress(0, len(plan.blocks))
        for visit in visits(checkpoint, segments, copy=copy, with_dense=dense_target > 0.0):
            before, after = checkpoint.widths[visit.index], plan.widths[visit.index]
            cut = _Cutter(visit, family, damping, damping_mode, dense_target)
            heads, heads_error = cut.heads(before, after, checkpoint.head_size)
            channels, channels_error = cut.channels(before, after)
            report = BlockReport(
                before=before,
                after=after,
                heads=tuple(heads.tolist()),
                channels=tuple(channels.tolist()),
                heads_error=heads_error,
                channels_error=channels_error,
                damping=cut.damping,
                seconds=visit.clock.seconds,
            )
            reports.append(report)
            logger.info(
                "block %d: %d heads, %d channels; errors %.4f and %.4f",
                *(visit.index, after.heads, after.channels),
                *(report.heads_error, report.channels_error),
            )
            on_progress(visit.index + 1, len(plan.blocks))
    return reports


class _Fit:
    """A layer that reads heads or channels, as a least-squares problem.

    Attributes:
        damping: that was used.
    """

    def __init__(
        self,
        visit: Visit,
        name: str,
        statistics: Statistics,
        *,
        damping: float,
        damping_mode: str,
        dense_target: float = 0.0,
    ) -> None:
        self._visit, self._name = visit, name
        self._layer = visit.block.get_submodule(name)
        self._bias = getattr(self._layer, "bias", None)
        # A bias takes over what the lost inputs add on average, so the weight need not.
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
        self._problem = problem
        self._output = weight @ wanted
        self._factor = factor(problem, damping, damping_mode)
        self.damping = self._factor.damping

    def elimination(self) -> Elimination:
        """Start removing inputs."""
        return Elimination(self._problem.weight, self._factor)

    def write(self, fitted: Elimination) -> float:
        """Cut the layer down to the inputs that are left; return its relative error."""
        rounded = self._visit.stored(f"{self._name}.weight", fitted.weight)
        bias = None
        if self._bias is not None:
            change = self._output - rounded.double() @ self._mean
            bias = self._visit.stored(f"{self._name}.bias", self._bias + change.float()).float()
        replace(self._layer, rounded[:, fitted.left].float(), bias)
        return relative_error(self._problem.weight, rounded.double(), self._problem.hessian)


class _Cutter:
    """Cuts one block, first its heads, then its channels.

    Attributes:
        damping: the most that was used.
    """

    def __init__(
        self, visit: Visit, family: Family, damping: float, damping_mode: str, dense_target: float
    ) -> None:
        self._visit, self._family = visit, family
        self._damping, self._mode, self._dense_target = damping, damping_mode, dense_target
        self.damping = 0.0

    def heads(self, before: Widths, after: Widths, size: int) -> tuple[Tensor, float]:
        """Returns int64[count], the query heads that stay, and the relative error."""
        layout = (after.heads, after.kv_heads)
        if layout == (before.heads, before.kv_heads) and not self._dense_target:
            return torch.arange(before.heads), 0.0
        fit = self._fit(self._family.heads.consumer)
        with self._visit.clock.measure("solve"):
            fitted = fit.elimination()
            kept = fitted.drop_heads((before.heads, before.kv_heads), keep=layout)
            error = fit.write(fitted)
            rows = head_rows(self._family.heads, kept, before, size)
            self._cut(self._family.heads.producers, rows)
            widths.fit_attention(self._visit.block, self._family, after, size)
        return kept, error

    def channels(self, before: Widths, after: Widths) -> tuple[Tensor, float]:
        """Returns int64[count], the channels that stay, and the relative error."""
        if before.channels == after.channels and not self._dense_target:
            return torch.arange(before.channels), 0.0
        fit = self._fit(self._family.channels.consumer)
        with self._visit.clock.measure("solve"):
            fitted = fit.elimination()
            fitted.drop_channels(after.channels)
            kept = fitted.left.nonzero().flatten()
            error = fit.write(fitted)
            producers = self._family.channels.producers
            self._cut(producers, [kept] * len(producers))
        return kept, error

    def _fit(self, name: str) -> _Fit:
        with self._visit.clock.measure("collect"):
            statistics = collect(self._visit.walk, [name], self._visit.dense)[name]
        with self._visit.clock.measure("solve"):
            fit = _Fit(
                *(self._visit, name, statistics),
                damping=self._damping,
                damping_mode=self._mode,
                dense_target=self._dense_target,
            )
        self.damping = max(self.damping, fit.damping)
        return fit

    def _cut(self, producers: Sequence[str], rows: Sequence[Tensor]) -> None:
        for name, kept in zip(producers, rows, strict=True):
            keep_outputs(self._visit.block.get_submodule(name), kept)


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
        return (numbers[:, None] * length + torch.arange(length)).flatten()

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
        artifact.write_json(path, {**json.loads(path.read_bytes()), **entries})
