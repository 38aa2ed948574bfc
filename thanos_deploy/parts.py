"""How many bytes of a checkpoint are embeddings, attention, feed-forward, norms and output head."""

import math

from thanos_deploy.checkpoint import Checkpoint

PARTS = ("embeddings", "attention", "mlp", "norms", "head")

# What families call the output head; a tied one is stored once, as embeddings.
_HEADS = ("lm_head", "embed_out")


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the weights by part, from the headers of the files; biases go with their layer."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, shape in checkpoint.weights.shapes.items():
        itemsize = checkpoint.weights.dtypes[name].itemsize
        sizes[_part(checkpoint, name, len(shape))] += math.prod(shape) * itemsize
    return sizes


def _part(checkpoint: Checkpoint, name: str, dimensions: int) -> str:
    family = checkpoint.family
    # Some checkpoints leave out the base model's name.
    blocks = f"{family.blocks.removeprefix(f'{family.base}.')}."
    module = name.removeprefix(f"{family.base}.").rpartition(".")[0]
    if module.startswith(blocks):
        layer = module.removeprefix(blocks).partition(".")[2]
        if layer in (*family.heads.producers, family.heads.consumer):
            return "attention"
        if layer in (*family.channels.producers, family.channels.consumer):
            return "mlp"
        return "norms"
    if module in _HEADS:
        return "head"
    return "embeddings" if dimensions > 1 else "norms"
