"""Compare removing residual-stream channels with cutting heads and feed-forward channels.

Usage: python -m benchmarks.hidden_channels --calib FILE --eval-text FILE [--hidden 504 432]

One common set of channels is removed from the whole network: from embeddings, norms, and every
linear layer that reads or writes the residual stream. The score of a channel is the OBS cost of
losing it as an input (see `thanos_deploy.solver.elimination`), summed over all blocks. Every layer
that reads or writes the stream is then refitted by least squares to its output in the dense model,
and the scale of the last norm channel by channel. The result is a stock LLaMA with a smaller
`hidden_size`. It is compared with a model of at most the same number of parameters, embeddings
included, that `thanos-deploy prune --pattern structured:P` makes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy.bundle.codec import encode
from thanos_deploy.calibration.blocks import LoadedInputs, block_inputs
from thanos_deploy.calibration.collect import Walk, advance, collect
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.pretrained import make_model
from thanos_deploy.pattern import Structured
from thanos_deploy.shrink.options import Cut
from thanos_deploy.solver.damping import DEFAULT
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.stages.checkpoints import plan_widths, shrink_checkpoint, survey_blocks
from thanos_deploy.stages.dense import Dense

BATCH = 4


def main() -> None:
    """Cut, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    texts.add_options(parser)
    parser.add_argument("--hidden", type=int, nargs="+", default=[504, 432])
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    checkpoint = Dense(str(gguf_path())).checkpoint()
    tokenizer = load_tokenizer(checkpoint.folder)
    ids = texts.calibration(arguments, tokenizer)
    held_out = texts.evaluation(arguments, tokenizer)
    dense = load_model(checkpoint.folder)
    rows = [row("dense", dense, held_out)]
    prices = channel_prices(checkpoint, dense, ids)
    losses = survey_blocks(checkpoint, ids, Cut(Structured(0.0)))
    for hidden in arguments.hidden:
        kept = prices.topk(hidden).indices.sort().values
        small = cut(checkpoint, dense, ids, kept)
        rows.append(row(f"hidden {hidden}", small, held_out))
        removed = parameters(dense) - parameters(small)
        fraction = removed / sum(p.numel() for p in blocks_of(checkpoint, dense).parameters())
        del small
        with tempfile.TemporaryDirectory() as folder:
            how = Cut(Structured(fraction))
            plan = plan_widths(checkpoint, losses, how)
            shrink_checkpoint(checkpoint, ids, Path(folder), plan, how)
            width = plan.widths[0]
            name = f"{width.heads}/{width.kv_heads} heads, {width.channels} channels"
            rows.append(row(name, load_model(Path(folder)), held_out))
    print(json.dumps({"rows": rows, "environment": encode(environment.describe())}))


def row(name: str, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Print one line of the table, and return it as a record."""
    value = perplexity(model, ids).value
    print(f"{name:40s} {parameters(model) / 1e6:7.1f} M parameters  perplexity {value:8.2f}")
    return {"model": name, "parameters": parameters(model), "perplexity": value}


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def blocks_of(checkpoint: Checkpoint, model: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer blocks."""
    blocks = model.get_submodule(checkpoint.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def start(checkpoint: Checkpoint, model: PreTrainedModel, ids: Tensor) -> list[LoadedInputs]:
    """Return the activations that enter the first block, in batches."""
    return block_inputs(model, checkpoint.family, torch.split(ids, BATCH))


@torch.no_grad()
def channel_prices(checkpoint: Checkpoint, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the cost of losing each channel of the residual stream, float64[hidden].

    It is the sum, over all groups of layers that read the stream together, of the OBS cost of the
    channel as a fraction of the energy of the group's output.
    """
    batches = start(checkpoint, model, ids)
    total = torch.zeros(checkpoint.config.hidden_size, dtype=torch.float64)
    for index, block in enumerate(blocks_of(checkpoint, model)):
        walk = Walk(index, block, batches)
        readers = [group for group in checkpoint.family.inputs if reads_stream(group)]
        statistics = collect(walk, [group[0] for group in readers])
        for group in readers:
            W = torch.cat([block.get_submodule(name).get_parameter("weight") for name in group])
            problem = LayerProblem(W.double(), statistics[group[0]].hessian.double(), group[0])
            energy = ((problem.weight @ problem.hessian) * problem.weight).sum()
            total += Elimination(problem.weight, factor(problem)).costs() / energy
        advance(walk)
    return total


def reads_stream(group: tuple[str, ...]) -> bool:
    """Whether the layers read the (normalised) residual stream, not heads or channels."""
    return not group[0].endswith(("o_proj", "down_proj"))


@torch.no_grad()
def cut(
    checkpoint: Checkpoint, dense: PreTrainedModel, ids: Tensor, kept: Tensor
) -> PreTrainedModel:
    """Return a stock model with some channels of the stream, refitted block by block.

    Args:
        checkpoint: checkpoint of the dense model.
        dense: the dense model, loaded.
        ids: calibration tokens, int64[count, length].
        kept: channels to keep, int64[hidden].
    """
    entries = {"hidden_size": len(kept), "head_dim": checkpoint.head_size}
    config = type(checkpoint.config).from_dict({**checkpoint.config.to_dict(), **entries})
    small: PreTrainedModel = make_model(config).float().eval()
    old, new = dense.state_dict(), small.state_dict()
    for name, weight in new.items():
        source = old[name]
        for axis in range(weight.dim()):
            if source.shape[axis] != weight.shape[axis]:
                source = source.index_select(axis, kept)
        weight.copy_(source)
    small.tie_weights()

    paths = start(checkpoint, dense, ids), start(checkpoint, small, ids)
    for index, (whole, part) in enumerate(
        zip(blocks_of(checkpoint, dense), blocks_of(checkpoint, small), strict=True)
    ):
        walks = Walk(index, whole, paths[0]), Walk(index, part, paths[1])
        for group in checkpoint.family.inputs:
            statistics = collect(walks[1], [group[0]], walks[0])[group[0]]
            H, C = statistics.hessian.double(), statistics.cross
            assert C is not None
            damping = DEFAULT.damping
            lower = torch.linalg.cholesky(H + damping * H.diagonal().mean() * torch.eye(len(H)))
            for name in group:
                layer = part.get_submodule(name).get_parameter("weight")
                W = whole.get_submodule(name).get_parameter("weight").double()
                W = W if reads_stream(group) else W[kept]
                missing = W @ C.double() - layer.double() @ H
                layer.add_(torch.cholesky_solve(missing.T, lower).T.float())
        for walk in walks:
            advance(walk)
    refit_last_norm(dense, small, paths, kept)
    return small


def refit_last_norm(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    paths: tuple[list[LoadedInputs], list[LoadedInputs]],
    kept: Tensor,
) -> None:
    """Fit the scale of each channel of the last norm to its output in the dense model."""
    norms = [model.base_model.get_submodule("norm") for model in (dense, small)]
    both = square = torch.zeros(len(kept))
    for batches in zip(*paths, strict=True):
        want, got = (norm(b.hidden) for norm, b in zip(norms, batches, strict=True))
        both = both + (want[..., kept] * got).sum(dim=(0, 1))
        square = square + got.square().sum(dim=(0, 1))
    norms[1].get_parameter("weight").mul_(both / square)


if __name__ == "__main__":
    main()
