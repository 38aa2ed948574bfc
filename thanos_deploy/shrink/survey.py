"""Measure what every block of the dense model would lose at which widths: a walk before the cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.collect import collect_relative
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.ranks.group import current
from thanos_deploy.shrink import experts
from thanos_deploy.shrink.refit import RefittedLayer
from thanos_deploy.shrink.sizing import Losses, layouts
from thanos_deploy.shrink.steps import channel_steps
from thanos_deploy.solver.damping import DEFAULT, Damping
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor


@dataclass(frozen=True, slots=True)
class _Lost:
    """One rank's message: the losses of a block that it has computed; see `Losses`.

    Attributes:
        channels: number of channels that stay -> loss.
        heads: as in `Losses`, for cuts that keep all key-value heads.
        heads_with_fewer_keys: as in `Losses`, for cuts that remove key-value heads.
    """

    channels: Mapping[int, float]
    heads: Mapping[int, Mapping[int, float]]
    heads_with_fewer_keys: Mapping[int, Mapping[int, float]]


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    multiple: int | None = None,
    damping: Damping = DEFAULT,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[Losses] | None = None,
    on_progress: OnProgress = silent,
) -> list[Losses]:
    """Measure what every block of the dense model would lose at which widths.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        multiple: see `Sizing`.
        damping: see `thanos_deploy.solver.hessian.factor`.
        device: where each block is while it is surveyed.
        hold: where the hidden states between two blocks are; see `activations.memory_for`.
        journal: see `walk.visit_blocks`.
        on_progress: called after every finished block.

    Returns:
        the losses of each block, in order.

    Raises:
        HessianError: the calibration statistics cannot be used.
    """
    family = checkpoint.family

    def look(visit: Visit) -> Losses:
        if family.experts is not None:
            return _of_experts(visit, checkpoint)
        width, ranks = checkpoint.widths[visit.index], current()
        consumers = [family.heads.consumer, family.channels.consumer]
        with visit.clock.measure("collect"):
            statistics = collect_relative(visit.walk, consumers)

        @cache
        def fitted(name: str) -> Elimination:
            layer = RefittedLayer(visit, name, statistics[name])
            return Elimination(layer.problem.weight, factor(layer.problem, damping))

        def of_heads(*, fewer_keys: bool) -> dict[int, dict[int, float]]:
            trial = fitted(family.heads.consumer).branch()
            found: dict[int, dict[int, float]] = {}
            for heads, kv_heads in layouts(width):
                if (kv_heads < width.kv_heads) == fewer_keys:
                    trial.drop_heads((width.heads, width.kv_heads), keep=(heads, kv_heads))
                    found.setdefault(kv_heads, {})[heads] = trial.loss / segments.numel()
            return found

        def of_channels() -> dict[int, float]:
            by_count = fitted(family.channels.consumer).channel_losses() / segments.numel()
            lost = by_count.tolist()
            steps = channel_steps(width.channels, multiple)
            return {left: lost[width.channels - left] for left in (width.channels, *steps)}

        def falls_to_me(number: int) -> bool:
            return number % ranks.size == ranks.rank

        with visit.clock.measure("solve"):
            # Three independent eliminations, one rank each: channels, and two ways to drop heads.
            said = ranks.gather(
                _Lost(
                    of_channels() if falls_to_me(0) else {},
                    of_heads(fewer_keys=False) if falls_to_me(1) else {},
                    of_heads(fewer_keys=True) if falls_to_me(2) else {},
                )
            )
        channels: dict[int, float] = {}
        heads: dict[int, Mapping[int, float]] = {}
        for one in said:
            channels |= one.channels
            heads |= one.heads
        for one in said:
            heads |= one.heads_with_fewer_keys
        return Losses(heads, channels, visit.clock.seconds)

    return visit_blocks(
        checkpoint,
        segments,
        look,
        journal=journal,
        device=device,
        hold=hold,
        on_progress=on_progress,
    )


def _of_experts(visit: Visit, checkpoint: Checkpoint) -> Losses:
    """Measure what a block would lose with each number of experts."""
    names, width = checkpoint.family.experts, checkpoint.widths[visit.index]
    if names is None or not width.experts:
        visit.clock.seconds.setdefault("collect", 0.0)
        return Losses({}, {}, visit.clock.seconds)
    found = experts.scores(visit, names)
    lost = {left: experts.dropped(found, left) for left in range(width.experts, 0, -1)}
    return Losses({}, {}, visit.clock.seconds, lost)
