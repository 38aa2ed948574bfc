"""A model that consists of the first blocks of another one, for benchmarks of its blocks alone."""

from pathlib import Path

from safetensors.torch import save_file

from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.files import write_json
from thanos_deploy.model import depth
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions


def write_first_blocks(checkpoint: Checkpoint, folder: Path, count: int) -> None:
    """Write a model with the first `count` blocks of a checkpoint to an existing folder."""
    copy_companions(checkpoint.folder, folder, None)
    config = folder / "config.json"
    write_json(config, loads(config.read_bytes()) | depth.describe(checkpoint, range(count)))
    left_out = tuple(block.prefix for block in checkpoint.blocks[count:])
    names = [
        stored
        for name, stored in checkpoint.weights.stored.items()
        if not name.startswith(left_out)
    ]
    save_file(checkpoint.weights.read(names), folder / "model.safetensors", {"format": "pt"})
