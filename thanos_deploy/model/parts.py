"""Bytes of a checkpoint by part: embeddings, attention, feed-forward, norms and output head."""

import math

from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import HEAD

PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bytes of the weights by part of `PARTS`; a bias counts with its layer."""
    sizes = dict.fromkeys(PARTS, 0)
    weights = checkpoint.weights
    linears = [frozenset(block.linears) for block in checkpoint.blocks]
    for name, stored in weights.stored.items():
        shape, itemsize = weights.shapes[stored], weights.dtypes[stored].itemsize
        sizes[_part(checkpoint, linears, name, len(shape))] += math.prod(shape) * itemsize
    return sizes


def _part(checkpoint: Checkpoint, linears: list[frozenset[str]], name: str, dimensions: int) -> str:
    heads, blocks = checkpoint.family.heads, f"{checkpoint.family.blocks}."
    module = name.rpartition(".")[0]
    if module.startswith(blocks):
        index, _, layer = module.removeprefix(blocks).partition(".")
        if layer in (*heads.producers, heads.consumer):
            return "attention"
        # The weight of a router counts with the experts.
        return "mlp" if dimensions > 1 or layer in linears[int(index)] else "norms"
    if module == HEAD:  # a tied head goes by the name of the embeddings
        return "head"
    return "embeddings" if dimensions > 1 else "norms"
