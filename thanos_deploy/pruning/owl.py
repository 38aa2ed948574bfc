"""OWL: the sparsity of each block from its number of outliers. For unstructured patterns.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
LLMs to High Sparsity", arXiv 2310.05175. Let D_l be the fraction of the Wanda scores |W_ij| ||X_j||
of all linear layers of block l that are larger than M times their mean, in the dense model. Blocks
with more outliers keep more:

    s_l = S + lambda (D - D_l) / max_k |D - D_k|        D = sum_l n_l D_l / sum_l n_l

with S the sparsity asked for and n_l the weights of block l. So the mean sparsity over the weights
is S, and no block's sparsity differs from S by more than lambda. (The published code scales
max D - min D to 2 lambda and takes the plain mean over blocks, which allows larger differences.)
All layers of a block get its sparsity. Their counts are rounded down to whole weights, and the
layers with the largest remainders lose one weight more each, so that exactly floor(S n) of all n
weights are removed.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.collect import collect
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.order import turns
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.errors import HessianError
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import Unstructured
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.recipe import Owl
from thanos_deploy.solver.mask import removed_count


@dataclass(frozen=True, slots=True)
class Outliers:
    """The outliers that the survey counted in one block.

    Attributes:
        ratio: D_l, the fraction of the block's scores that are outliers.
        seconds: time that the survey of the block took, by activity; see `layers.ACTIVITIES`.
    """

    ratio: float
    seconds: Mapping[str, float]


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    segments: Tensor,
    layers: Collection[str],
    options: Owl,
    *,
    device: torch.device = CPU,
    hold: Place = "auto",
    journal: Journal[Outliers] | None = None,
    on_progress: OnProgress = silent,
) -> list[Outliers]:
    """Count the outliers of every block, in one walk through the dense model.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        layers: full names of the linear layers that count; a block without any has a ratio of 0.
        options: the options of OWL, of which `threshold` is used.
        device: where each block is while it is surveyed.
        hold: see `layers.prune`.
        journal: see `layers.prune`.
        on_progress: called after every finished block.

    Raises:
        HessianError: activations or weights are not finite.
    """

    def look(visit: Visit) -> Outliers:
        structure, scores = visit.structure, []
        inputs = {
            name: matrix(visit.block.get_submodule(name)).shape[1] for name in structure.linears
        }
        for turn in turns(structure, inputs, true_sequential=False):
            with memory_for(f"block {visit.index}"), visit.clock.measure("collect"):
                statistics = collect(visit.walk, [group[0] for group in turn])
            scores += [
                (matrix(visit.block.get_submodule(name)).abs() * norms).flatten()
                for group in turn
                for norms in [statistics[group[0]].hessian.diagonal().sqrt()]
                for name in group
                if visit.prefix + name in layers
            ]
        ratio = _ratio(torch.cat(scores), visit.prefix, options.threshold) if scores else 0.0
        return Outliers(ratio, visit.clock.seconds)

    return visit_blocks(
        checkpoint,
        segments,
        look,
        journal=journal,
        device=device,
        hold=hold,
        on_progress=on_progress,
    )


def _ratio(scores: Tensor, block: str, threshold: float) -> float:
    mean = scores.mean(dtype=torch.float64).item()
    if not math.isfinite(mean):
        raise HessianError(
            f"{block.rstrip('.')}: activations or weights are not finite, so outliers cannot be "
            "counted",
            fix="use --allocation uniform, or other calibration text",
        )
    return int((scores > threshold * mean).sum()) / scores.numel()


def allocate(
    ratios: Sequence[float],
    blocks: Sequence[Mapping[str, int]],
    sparsity: float,
    options: Owl,
) -> dict[str, Unstructured]:
    """Compute the pattern of every layer from the outlier ratios of the blocks.

    Args:
        ratios: D_l of every block, from `survey`.
        blocks: for each block, maps the full name of a layer to its number of weights.
        sparsity: S.
        options: the options of OWL, of which `schedule` is used.

    Returns:
        the pattern of each layer, by its full name. With these, `removed_count` gives the intended
        count for every layer, and the counts add up to floor(S n).
    """
    entries = {name: count for block in blocks for name, count in block.items()}
    total = sum(entries.values())
    # In exact arithmetic, so that rounding does not make equal blocks different.
    outliers = [Fraction(ratio) for ratio in ratios]
    sizes = [sum(block.values()) for block in blocks]
    weighted = (d * size for d, size in zip(outliers, sizes, strict=True))
    mean = sum(weighted, Fraction(0)) / total
    furthest = max(abs(mean - d) for d, size in zip(outliers, sizes, strict=True) if size)
    scale = Fraction(options.spread) / furthest if furthest else Fraction(0)
    wanted = {
        name: count * (Fraction(sparsity) + scale * (mean - d))
        for d, block in zip(outliers, blocks, strict=True)
        for name, count in block.items()
    }
    removed = {name: math.floor(number) for name, number in wanted.items()}
    left_over = removed_count(sparsity, total) - sum(removed.values())
    by_loss = sorted(wanted, key=lambda name: removed[name] - wanted[name])
    for name in by_loss[:left_over]:
        removed[name] += 1
    return {name: Unstructured(removed[name] / count) for name, count in entries.items()}
