"""Measure settings of the solver that quantises layers, layer by layer, on a second text.

Usage: python -m benchmarks.quantised_layers --calib CALIB.txt --eval-text TEXT.txt

Quantises the linear layers of some blocks of SmolLM2-135M-Instruct, each by itself, with the
activations of the dense model on the first text. Prints the fraction of the output's energy that is
lost, as the geometric mean over the layers, on the first text and on the second, which counts.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy.calibration.walk import visits
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.progress import quietly
from thanos_deploy.pruning.layers import gather
from thanos_deploy.solver.codes import round_to
from thanos_deploy.solver.damping import DAMPING_MODES, Damping
from thanos_deploy.solver.grid import Grid, parse
from thanos_deploy.solver.layer import LayerProblem, relative_error
from thanos_deploy.solver.quantise import PASSES, quantise
from thanos_deploy.stages.dense import Dense

_FRACTIONS = (0.01, 0.05, 0.15, 0.5)
_TRIED = (0, 1, 3, 6)

# Maps the name of a layer to its weight and the Hessian of its input.
Layers = dict[str, tuple[Tensor, Tensor]]


def layers_of(source: Checkpoint, segments: Tensor, blocks: Sequence[int]) -> Layers:
    """Return the layers of some blocks, with the Hessians of their inputs on a text."""
    found: Layers = {}
    for visit in visits(source, segments):
        if visit.index in blocks:
            names = {visit.prefix + linear for linear in visit.structure.linears}
            for groups, statistics in gather(visit, names, Walk()):
                for group in groups:
                    for linear in group:
                        weight = matrix(visit.block.get_submodule(linear)).float().clone()
                        found[visit.prefix + linear] = weight, statistics[group[0]].hessian
        if visit.index == max(blocks):
            break
    return found


def judge(name: str, seen: Layers, other: Layers, weights: dict[str, Tensor]) -> None:
    """Print the mean relative error of quantised weights on both texts."""
    means = [
        math.exp(
            fmean(
                math.log(relative_error(weight, weights[layer], hessian))
                for layer, (weight, hessian) in layers.items()
            )
        )
        for layers in (seen, other)
    ]
    print(f"| {name} | {1e3 * means[0]:.3f} | {1e3 * means[1]:.3f} |", flush=True)


def quantised(layers: Layers, grid: Grid, damping: Damping, passes: int) -> dict[str, Tensor]:
    """Return the quantised weights of all layers, by name."""
    return {
        name: quantise(
            LayerProblem(weight, hessian, name), grid, damping, passes=passes
        ).quantised.weight
        for name, (weight, hessian) in layers.items()
    }


@torch.no_grad()
def main() -> None:
    """Print a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    texts.add_options(parser)
    parser.add_argument("--calib-segments", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=(2, 11))
    parser.add_argument("--grid", type=parse, default=Grid(4))
    arguments = parser.parse_args()
    source = Dense(str(gguf_path())).checkpoint(quietly)
    tokenizer = load_tokenizer(source.folder)
    calib = texts.calibration(arguments, tokenizer, count=arguments.calib_segments)
    seen, other = (
        layers_of(source, segments, arguments.blocks)
        for segments in (calib, texts.evaluation(arguments, tokenizer))
    )
    print("| thousandths of the energy | text | other text |\n|---|---:|---:|")
    rounded = {name: round_to(weight, arguments.grid).weight for name, (weight, _) in seen.items()}
    judge(f"{arguments.grid}, rounded", seen, other, rounded)
    for passes in _TRIED:
        weights = quantised(seen, arguments.grid, Damping(), passes)
        judge(f"mean damping 0.01, {passes} passes", seen, other, weights)
    for mode in DAMPING_MODES:
        for fraction in _FRACTIONS:
            damping = Damping(damping=fraction, damping_mode=mode)
            weights = quantised(seen, arguments.grid, damping, PASSES)
            judge(f"{mode} damping {fraction}, {PASSES} passes", seen, other, weights)


if __name__ == "__main__":
    main()
