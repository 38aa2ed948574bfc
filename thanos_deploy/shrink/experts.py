"""Cut experts out of a model, or channels out of its experts.

Experts are removed by their REAP score, the mean norm of what an expert adds to the tokens that the
router sends to it:

    S_j = 1 / |X_j| * sum over x in X_j of g_j(x) * |f_j(x)|

with X_j the tokens for which expert j is chosen, g_j(x) its router weight as the model uses it, f_j
its output and |.| the Euclidean norm; S_j is 0 if there is no token. Source: "REAP the Experts"
(Lasby and others, 2025, arXiv 2510.13999), equation 9. The same number of experts stays in every
block, with their rows of the router, so that only the number of experts changes in config.json.
Nothing is refitted. The scores of a block are measured after the blocks before it have been cut.

Channels are removed from every expert by the same cost as in `cut` for a dense network, with the
Hessian of the tokens that the expert saw, and the layer that reads them is refitted. The same
number of channels stays in every expert of every block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thanos_deploy.calibration.collect import collect, collect_norms
from thanos_deploy.calibration.order import turns
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.experts import Expert, SeparateExperts
from thanos_deploy.model.families import Experts
from thanos_deploy.model.linear import keep_outputs, matrix, replace
from thanos_deploy.model.widths import Widths
from thanos_deploy.ranks.group import current
from thanos_deploy.shrink.options import Fit, Part, Sizing
from thanos_deploy.shrink.refit import RefittedLayer, spread
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.steps import channel_steps
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor


def planned(checkpoint: Checkpoint, fraction: float, sizing: Sizing) -> tuple[Widths, ...]:
    """Return the largest widths at which at least a fraction of all blocks' parameters is removed.

    Args:
        checkpoint: a model with experts.
        fraction: fraction of the parameters of all blocks.
        sizing: what to remove: channels of every expert if its part is "ffn", else experts.

    Returns:
        the widths of every block.

    Raises:
        UsageError: too few experts or channels would be left, or the sizing cannot be used with
            experts; the message names a valid choice.
    """
    names = _names(checkpoint)
    if sizing.part == "heads" or sizing.allocation != "uniform":
        raise UsageError(
            f"{checkpoint.folder}: in a model with experts, heads cannot be cut out, and "
            "all blocks lose the same number of experts or channels: the experts hold "
            "nearly all parameters, and a stock config.json has one number for all blocks",
            fix="use --shrink experts or --shrink ffn, with --allocation uniform",
        )
    routed = [width for width in checkpoint.widths if width.experts]
    before, chosen = routed[0], int(checkpoint.config.num_experts_per_tok)
    whole, one, channel = _prices(checkpoint, names)
    missing = math.ceil(fraction * whole - 1e-6) / len(routed)
    steps: Sequence[int]
    if _cuts_experts(sizing.part):
        price, steps, there = one, range(before.experts - 1, chosen - 1, -1), before.experts
        what, least = "experts", f"a token is sent to {chosen} of them"
    else:
        price, steps = before.experts * channel, channel_steps(before.channels, sizing.multiple)
        what, there, least = (
            "channels",
            before.channels,
            f"they are cut out in steps of {-steps.step}",
        )
    enough = [left for left in steps if (there - left) * price >= missing]
    if not enough:
        nearest = (there - steps[-1]) * price * len(routed) / whole if steps else 0.0
        raise UsageError(
            f"{checkpoint.folder}: too few {what} would be left with {fraction:.1%} of the blocks' "
            f"parameters removed: there are {there}, and {least}",
            fix=f"remove at most structured:{math.floor(1000 * nearest) / 1000:g}, or use "
            f"--shrink {'ffn' if what == 'experts' else 'experts'}",
        )
    return tuple(
        width
        if not width.experts
        else Widths(width.heads, width.kv_heads, width.channels, enough[0])
        if what == "experts"
        else Widths(width.heads, width.kv_heads, enough[0], width.experts)
        for width in checkpoint.widths
    )


def check(checkpoint: Checkpoint, fraction: float, sizing: Sizing, fit: Fit) -> None:
    """Refuse a cut that cannot be made, before anything is computed.

    Raises:
        UsageError: see `planned` and `check_fit`.
    """
    planned(checkpoint, fraction, sizing)
    check_fit(checkpoint, fit)


def check_fit(checkpoint: Checkpoint, fit: Fit) -> None:
    """Refuse a refit that is impossible in a model with experts.

    Raises:
        UsageError: `fit.dense_target` is not 0.
    """
    if fit.dense_target:
        raise UsageError(
            f"{checkpoint.folder}: --dense-target {fit.dense_target:g} cannot be used "
            "where experts are cut out: the dense model's router sends other tokens to "
            "each expert than the pruned model's",
            fix="leave --dense-target out",
        )


def block_parameters(checkpoint: Checkpoint, width: Widths, index: int) -> int:
    """Return the number of parameters of a block at its own widths or at smaller ones."""
    names, before = _names(checkpoint), checkpoint.widths[index]
    own = checkpoint.entries_of_block(index)
    if not before.experts:
        return sum(own.values())
    _, one, channel = _prices(checkpoint, names)
    gone = (before.experts - width.experts) * one
    return sum(own.values()) - gone - width.experts * (before.channels - width.channels) * channel


def scores(visit: Visit, names: Experts) -> list[Statistics]:
    """Measure what each expert adds to its tokens: `mass` is their number, `total` sums g * |f|."""
    experts = _experts(visit, names)
    entrances = {str(number): expert.gives for number, expert in enumerate(experts)}
    with visit.clock.measure("collect"):
        return list(collect_norms(visit.walk, entrances).values())


def cut(visit: Visit, checkpoint: Checkpoint, after: Widths, fit: Fit) -> CutBlock:
    """Cut one block down to the widths `after`, in place; see `cut.shrink`."""
    names, before = _names(checkpoint), checkpoint.widths[visit.index]
    experts: tuple[int, ...] = ()
    channels: tuple[tuple[int, ...], ...] = ()
    unfitted: dict[str, str] = {}
    error = damping = 0.0
    if after.experts < before.experts:
        found = scores(visit, names)
        experts = _keep(visit, names, found, after.experts)
        error = dropped(found, after.experts)
    elif after.channels < before.channels:
        narrower = _Narrower(visit, names, after.channels, fit)
        narrower.run()
        channels, unfitted = tuple(narrower.channels), narrower.unfitted
        error, damping = narrower.error, narrower.damping
    return CutBlock(
        before=before,
        after=after,
        heads=tuple(range(before.heads)),
        channels=(),
        heads_error=0.0,
        channels_error=error,
        damping=damping,
        seconds=visit.clock.seconds,
        experts=experts,
        expert_channels=channels,
        unfitted=unfitted,
    )


def score(one: Statistics) -> float:
    """REAP's score S_j of an expert; see the module."""
    return one.total.item() / one.mass if one.mass else 0.0


def dropped(found: Sequence[Statistics], left: int) -> float:
    """Return the share of the sum of g * |f| that is lost if the `left` best experts stay."""
    by_score = sorted(found, key=score, reverse=True)
    whole = sum(one.total.item() for one in found)
    return sum(one.total.item() for one in by_score[left:]) / whole if whole else 0.0


def _keep(visit: Visit, names: Experts, found: Sequence[Statistics], count: int) -> tuple[int, ...]:
    """Keep the `count` experts with the highest scores, and their rows of the router."""
    experts = _experts(visit, names)
    order = sorted(range(len(experts)), key=lambda number: (-score(found[number]), number))
    kept = sorted(order[:count])
    parent, _, name = names.module.rpartition(".")
    left = SeparateExperts([experts[number] for number in kept])
    setattr(visit.block.get_submodule(parent), name, left)
    router = visit.block.get_submodule(names.router)
    for parameter, rows in list(router.named_parameters()):
        setattr(router, parameter, nn.Parameter(rows.detach()[kept], requires_grad=False))
    return tuple(kept)


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """The result of cutting one expert, without its weights.

    Attributes:
        kept: numbers of the channels that stay.
        error: relative error of the layer that reads them; 0 if it was not refitted.
        damping: the damping that was used.
        unfitted: why the layer was not refitted; empty if it was.
    """

    kept: tuple[int, ...]
    error: float
    damping: float
    unfitted: str


class _Narrower:
    """Cuts channels out of every expert of a block.

    Attributes:
        channels: for each expert, the numbers of the channels that stay.
        error: the largest relative error of a layer that was refitted.
        damping: the largest damping that was used.
        unfitted: maps the name of each layer that was not refitted to the reason.
    """

    def __init__(self, visit: Visit, names: Experts, left: int, fit: Fit) -> None:
        self._visit, self._names, self._left, self._fit = visit, names, left, fit
        self.channels: list[tuple[int, ...]] = []
        self.unfitted: dict[str, str] = {}
        self.error = self.damping = 0.0

    def run(self) -> None:
        """Cut all experts, divided over the ranks: no expert reads the output of another."""
        visit, names, ranks = self._visit, self._names, current()
        consumers = {names.consumer(number) for number in range(len(_experts(visit, names)))}
        inputs = {
            name: matrix(visit.block.get_submodule(name)).shape[1]
            for name in visit.structure.linears
            if name in consumers
        }
        for turn in turns(visit.structure, inputs, true_sequential=True):
            with visit.clock.measure("collect"):
                statistics = collect(visit.walk, [name for (name,) in turn])
            with visit.clock.measure("solve"):
                mine = [name for (name,) in turn[ranks.rank :: ranks.size]]
                statistics = {name: statistics[name] for name in mine}
                own = {name: self._fitted(name, statistics.pop(name)) for name in mine}
                said = ranks.merge(own, _Narrowed)
                for place, (name,) in enumerate(turn):
                    self._take(name, said[name], place % ranks.size)

    def _take(self, consumer: str, narrowed: "_Narrowed", owner: int) -> None:
        """Take over, on all ranks, the expert that its owner has cut, and cut its producers."""
        visit, number = self._visit, len(self.channels)
        kept = torch.tensor(narrowed.kept, device=visit.device)
        if owner != current().rank:
            layer = visit.block.get_submodule(consumer)
            replace(layer, matrix(layer)[:, kept], getattr(layer, "bias", None))
        spread(visit, consumer, owner)
        for producer in self._names.producers(number):
            keep_outputs(visit.block.get_submodule(producer), kept)
        self.channels.append(narrowed.kept)
        if narrowed.unfitted:
            self.unfitted[visit.prefix + consumer] = narrowed.unfitted
        self.error = max(self.error, narrowed.error)
        self.damping = max(self.damping, narrowed.damping)

    def _fitted(self, consumer: str, statistics: Statistics) -> "_Narrowed":
        """Cut channels out of the layer of an expert that reads them, and refit that layer."""
        if why := statistics.too_few:
            kept = self._without_fit(consumer, statistics)
            return _Narrowed(tuple(kept.tolist()), 0.0, 0.0, why)
        layer = RefittedLayer(self._visit, consumer, statistics)
        factored = factor(layer.problem, self._fit)
        fitted = Elimination(layer.problem.weight, factored)
        fitted.drop_channels(self._left)
        error = layer.write(fitted.weight, fitted.left)
        kept = fitted.left.nonzero().flatten()
        return _Narrowed(tuple(kept.tolist()), error, factored.damping, "")

    def _without_fit(self, consumer: str, statistics: Statistics) -> Tensor:
        """Keep the channels with the highest energy of weight times input, as in Wanda's score."""
        layer = self._visit.block.get_submodule(consumer)
        weight = matrix(layer)
        energy = statistics.hessian.diagonal() if statistics.mass else torch.ones_like(weight[0])
        price = weight.double().square().sum(dim=0) * energy
        kept = price.argsort(descending=True, stable=True)[: self._left].sort().values
        replace(layer, weight[:, kept], getattr(layer, "bias", None))
        return kept


def _cuts_experts(part: Part) -> bool:
    return part != "ffn"


def _names(checkpoint: Checkpoint) -> Experts:
    names = checkpoint.family.experts
    assert names is not None
    return names


def _experts(visit: Visit, names: Experts) -> list[Expert]:
    held = visit.block.get_submodule(names.module)
    return [one for one in held.children() if isinstance(one, Expert)]


def _prices(checkpoint: Checkpoint, names: Experts) -> tuple[int, int, int]:
    """Count the parameters of all blocks, of one expert, and of one channel of an expert.

    An expert's own rows of the router are counted with it.
    """
    indices = range(len(checkpoint.widths))
    whole = sum(sum(checkpoint.entries_of_block(index).values()) for index in indices)
    index = next(index for index in indices if checkpoint.widths[index].experts)
    before, sizes = checkpoint.widths[index], checkpoint.entries_of_block(index)
    first = {name: size for name, size in sizes.items() if name.startswith(f"{names.module}.0.")}
    router = sum(size for name, size in sizes.items() if name.startswith(f"{names.router}."))
    kept = sum(size for name, size in first.items() if name == f"{names.consumer(0)}.bias")
    one = sum(first.values()) + router // before.experts
    return whole, one, (sum(first.values()) - kept) // before.channels
