"""Cut attention heads and feed-forward channels out of a model, and refit the rest.

In every block, first the heads: collect statistics, choose the heads that stay, refit the layer
that reads them (the consumer), and cut the layers that compute them (the producers). Then collect
again with the smaller attention, and do the same for the feed-forward channels. Later blocks see
the outputs of the blocks that are already cut. Cutting the producers changes no output, because
nothing reads the rows that are removed.

    survey.survey  a walk through the dense model: what every block would lose at which widths
    sizing.plan    choose the widths of every block from these losses
    cut.shrink     the walk that cuts, and writes an ordinary model folder with smaller tensors
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import Json, loads
from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.collect import collect, pass_by
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.tune import tune
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import multiplies_bfloat16, products_in
from thanos_deploy.methods import NO_TUNING, Tuning
from thanos_deploy.model import depth, widths
from thanos_deploy.model.block import DROPPED
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.families import Family, Heads
from thanos_deploy.model.linear import keep_outputs
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.model.widths import Widths
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.ranks.group import current
from thanos_deploy.shrink import experts
from thanos_deploy.shrink.options import Fit
from thanos_deploy.shrink.refit import RefittedLayer, spread
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Plan
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import Factor

logger = logging.getLogger(__name__)


def check(checkpoint: Checkpoint) -> None:
    """Refuse a model whose blocks cannot be cut, before anything is computed.

    Raises:
        ModelError: the family's structure was discovered rather than described, the rows of
            queries, keys and values are not laid out as the family describes, or the blocks already
            have different widths.
    """
    family, size = checkpoint.family, checkpoint.head_size
    if family.discovered:
        raise ModelError(
            f"{checkpoint.folder}: nothing can be cut out of a {checkpoint.config.model_type} "
            f"model: {family.heads.fixed}",
            fix="prune it to a pattern that keeps shapes, such as --pattern 2:4, or add a row: "
            "docs/develop/add-a-family.md",
        )
    if family.experts is not None:
        return
    if len(set(checkpoint.widths)) > 1:
        raise ModelError(
            f"{checkpoint.folder}: its blocks have different widths already",
            fix="shrink the dense model that this model was made from, once, by the total fraction",
        )
    width = checkpoint.widths[0]
    for name, rows in zip(
        family.heads.producers, widths.producer_rows(family, width, size), strict=True
    ):
        weight = checkpoint.stored_name(f"{family.blocks}.0.{name}.weight")
        found = checkpoint.weights.shapes[weight][1 if family.transposed else 0]
        if found != rows:
            raise ModelError(
                f"{weight}: the weight has {found} rows of queries, keys and values, where "
                f"{rows} were expected for {width.heads} heads and {width.kv_heads} "
                f"key-value heads of {size}",
                fix="prune the model with --keep-shape, or describe its layout in "
                "thanos_deploy/model/families.py",
            )


def shrink(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    plan: Plan,
    fit: Fit,
    tuning: Tuning = NO_TUNING,
    *,
    further: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[CutBlock] | None = None,
    on_progress: OnProgress = silent,
) -> list[CutBlock]:
    """Cut a model down to a plan, and write it as a model folder.

    Stock libraries can load the folder if the plan is `stock`.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder; None for a rank that writes nothing.
        plan: the widths of each block.
        fit: how to refit the layers.
        tuning: how to tune each block as a whole after its cut.
        further: int64[count, length], tokens that are used for tuning only; None for none.
        dtype: dtype to store, or None to keep each tensor's own.
        device: where each block is while it is cut.
        hold: where the hidden states between two blocks are; see `activations.memory_for`.
        journal: see `walk.visit_blocks`.
        on_progress: called after every finished block.

    Returns:
        the result of each block, in order.

    Raises:
        ModelError: weights are missing, have NaN, or do not have the layout of their family.
        HessianError: the calibration statistics cannot be used.
    """
    check(checkpoint)
    family = checkpoint.family
    if destination is not None:
        copy_companions(checkpoint.folder, destination, dtype)
        _describe(checkpoint, destination, plan)
    kept = plan.kept
    prefixes = tuple(f"{family.blocks}.{number}." for number in kept)
    shapes = {
        checkpoint.stored_name(name): tuple(parameter.shape)
        for name, parameter in checkpoint.skeleton(plan.widths_of_kept).named_parameters()
        if name.startswith(prefixes)
    }
    gone = {
        stored
        for name, stored in checkpoint.weights.stored.items()
        if name.startswith(f"{family.blocks}.") and stored not in shapes
    }
    names = depth.renamed(checkpoint, kept) if plan.drops_blocks else None

    tuned = tuning.tune_steps > 0

    def work(visit: Visit) -> CutBlock:
        # Blocks before the first dropped one equal the dense model's, so they need no tuning.
        same = plan.drops_blocks and kept[: visit.index + 1] == (*range(visit.index + 1),)
        with memory_for(f"block {visit.index}"):
            width, steps = plan.widths[visit.index], NO_TUNING if same else tuning
            report = cut(visit, checkpoint, width, fit, steps)
        logger.info(
            "block %d: %d heads (relative error %.4f), %d channels (%.4f)",
            visit.index,
            report.after.heads,
            report.heads_error,
            report.after.channels,
            report.channels_error,
        )
        return report

    with (
        torch.no_grad(),
        products_in(torch.float32),
        WeightsCopy(checkpoint.weights, destination, dtype, shapes, gone, names) as copy,
    ):
        return visit_blocks(
            checkpoint,
            segments,
            work,
            copy=copy,
            further=further,
            tuned_in=torch.bfloat16 if tuned and multiplies_bfloat16(device) else None,
            with_dense=fit.dense_target > 0.0 or tuned,
            journal=journal,
            device=device,
            hold=hold,
            on_progress=on_progress,
        )


def cut(
    visit: Visit, checkpoint: Checkpoint, after: Widths, fit: Fit, tuning: Tuning = NO_TUNING
) -> CutBlock:
    """Cut one block down to the widths `after`, and tune it as a whole, in place; see `shrink`."""
    if after.dropped:
        return _drop(visit, checkpoint.widths[visit.index])
    if checkpoint.family.experts is None:
        report = _cut(visit, checkpoint, after, fit)
    else:
        report = experts.cut(visit, checkpoint, after, fit)
    if tuning.tune_steps:
        there = dict(visit.block.named_modules())  # some experts may have been removed
        left = [name for name in visit.structure.linears if name in there]
        with visit.clock.measure("tune"):
            tune(visit, left, tuning.tune_steps)
    return report


def _drop(visit: Visit, before: Widths) -> CutBlock:
    """Drop a block: pass the hidden states on unchanged, and write none of its parameters."""
    with visit.clock.measure("collect"):
        pass_by(visit.walk)
    visit.untouched.update(name for name, _ in visit.block.named_parameters())
    return CutBlock(
        before=before,
        after=DROPPED,
        heads=(),
        channels=(),
        heads_error=1.0,
        channels_error=1.0,
        damping=0.0,
        seconds=visit.clock.seconds,
    )


def _cut(visit: Visit, checkpoint: Checkpoint, after: Widths, fit: Fit) -> CutBlock:
    before = checkpoint.widths[visit.index]
    cutter = _Cutter(visit, checkpoint.family, before, after, fit)
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


class _Cutter:
    """Cuts one block.

    Attributes:
        heads, channels: int64[count], numbers of the query heads and channels that stay.
        heads_error, channels_error: relative errors of the layers that read them.
        damping: the largest damping that was used.
    """

    def __init__(
        self, visit: Visit, family: Family, before: Widths, after: Widths, fit: Fit
    ) -> None:
        self._visit, self._family = visit, family
        self._before, self._after, self._fit = before, after, fit
        self.heads, self.channels = torch.arange(before.heads), torch.arange(before.channels)
        self.heads_error = self.channels_error = self.damping = 0.0

    def run(self, size: int) -> None:
        """Cut or refit layer by layer in the order of the forward pass; `size` is the head size."""
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
            if self._fit.dense_target:
                self._aim(group)

    def _aim(self, group: tuple[str, ...]) -> None:
        """Refit layers that lose no input towards the dense model's outputs, divided over ranks."""
        statistics, visit, ranks = self._collect(group[0]), self._visit, current()
        factors: dict[bool, dict[tuple[float, str], Factor]] = {True: {}, False: {}}
        with visit.clock.measure("solve"):
            for name in group[ranks.rank :: ranks.size]:
                biased = getattr(visit.block.get_submodule(name), "bias", None) is not None
                target = self._fit.dense_target
                layer = RefittedLayer(visit, name, statistics, target, factors[biased])
                weight = layer.problem.weight
                layer.write(weight, torch.ones_like(weight[0], dtype=torch.bool))
            for number, name in enumerate(group):
                spread(visit, name, number % ranks.size)

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
            channels = self._family.channels
            starts = [part * self._before.channels for part in range(channels.rows)]
            rows = torch.cat([start + self.channels for start in starts])
            for name in channels.producers:
                keep_outputs(self._visit.block.get_submodule(name), rows)

    def _start(self, name: str) -> tuple[RefittedLayer, Elimination]:
        statistics = self._collect(name)
        with self._visit.clock.measure("solve"):
            layer = RefittedLayer(self._visit, name, statistics, self._fit.dense_target)
            factored = factor(layer.problem, self._fit, current())
            self.damping = max(self.damping, factored.damping)
            return layer, Elimination(layer.problem.weight, factored)

    def _collect(self, name: str) -> Statistics:
        with self._visit.clock.measure("collect"):
            dense = self._visit.dense if self._fit.dense_target else None
            return collect(self._visit.walk, [name], dense)[name]


def head_rows(heads: Heads, kept: Tensor, before: Widths, size: int) -> list[Tensor]:
    """Return the rows of each producer that belong to the heads that stay.

    These are the rows of the kept query heads, and of the key-value heads that they use.

    Args:
        heads: how the family lays out the heads.
        kept: int64[count], numbers of the query heads that stay, rising.
        before: widths before the cut.
        size: head size, in rows of a producer.

    Returns:
        int64 row numbers for each producer, in the order of `heads.producers`.
    """

    def rows(numbers: Tensor, length: int) -> Tensor:
        within = torch.arange(length, device=numbers.device)
        return (numbers[:, None] * length + within).flatten()

    queries = rows(kept, size)
    keys = rows(torch.unique(kept // (before.heads // before.kv_heads)), size)
    match heads.layout:
        case "separate":
            return [queries, keys, keys]
        case "by head":
            return [rows(kept, 3 * size)]
        case "by part":
            first, second = before.heads * size, (before.heads + before.kv_heads) * size
            return [torch.cat([queries, first + keys, second + keys])]


def _describe(checkpoint: Checkpoint, destination: Path, plan: Plan) -> None:
    """Record the new widths in config.json, or in `widths.FILE` if config.json cannot hold them."""
    if plan.drops_blocks:
        entries: Json | None = depth.describe(checkpoint, plan.kept)
    else:
        entries = widths.describe(checkpoint.config, checkpoint.family, plan.widths)
    (destination / widths.FILE).unlink(missing_ok=True)
    if entries is None:
        widths.declare(destination, plan.widths)
    else:
        path = destination / "config.json"
        written = loads(path.read_bytes())
        # Where the library knows an entry by two names, only names already in the file are written.
        known = checkpoint.config.attribute_map or {}
        aliases = {one for pair in known.items() for one in pair if written.keys() & set(pair)}
        unsaid = {name for name in entries if name in aliases and name not in written}
        files.write_json(
            path,
            {**written, **{name: one for name, one in entries.items() if name not in unsaid}},
        )
