"""How many bytes of a checkpoint are embeddings, attention, feed-forward, norms and output head."""

import math

from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import HEAD

PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the weights by part, from the headers of the files; biases go with their layer."""
    sizes = dict.fromkeys(PARTS, 0)
    weights = checkpoint.weights
    for name, stored in weights.stored.items():
        shape, itemsize = weights.shapes[stored], weights.dtypes[stored].itemsize
        sizes[_part(checkpoint, name, len(shape))] += math.prod(shape) * itemsize
    return sizes


def _part(checkpoint: Checkpoint, name: str, dimensions: int) -> str:
    family = checkpoint.family
    blocks = f"{family.blocks}."
    module = name.rpartition(".")[0]
    if module.startswith(blocks):
        layer = module.removeprefix(blocks).partition(".")[2]
        if layer in (*family.heads.producers, family.heads.consumer):
            return "attention"
        if layer in (*family.channels.producers, family.channels.consumer):
            return "mlp"
        return "norms"
    if module == HEAD:  # not if it is tied, which goes by the name of the embeddings
        return "head"
    return "embeddings" if dimensions > 1 else "norms"
