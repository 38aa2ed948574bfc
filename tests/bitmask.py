"""Write checkpoints in the format sparse-24-bitmask, which compressed-tensors has dropped."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def bitmask_folder(source: Path, destination: Path, *, keep_weight: bool) -> None:
    """Write a 2:4 checkpoint as compressed-tensors wrote it; the reference for tests of the reader.

    Args:
        source: folder of the 2:4 model.
        destination: folder of the new checkpoint, which must not exist.
        keep_weight: whether the names of the three parts of a weight keep ".weight", as in early
            versions.
    """
    destination.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        stem = name if keep_weight else name.removesuffix(".weight")
        # The two largest of every four weights are stored, even if one or both are zero.
        where = torch.zeros(tensor.numel() // 4, 4, dtype=torch.bool)
        where.scatter_(1, tensor.reshape(-1, 4).abs().topk(2, dim=1).indices, True)
        where = where.reshape(tensor.shape)
        tensors[f"{stem}.compressed"] = tensor[where].reshape(len(tensor), -1)
        tensors[f"{stem}.shape"] = torch.tensor(tensor.shape).reshape(-1, 1)
        tensors[f"{stem}.bitmask"] = torch.from_numpy(
            np.packbits(where.numpy(), axis=1, bitorder="little")
        )
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    }
    (destination / "config.json").write_text(json.dumps(config))
