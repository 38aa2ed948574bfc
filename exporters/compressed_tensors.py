"""A quantised checkpoint in the format pack-quantized of compressed-tensors.

Stock transformers, vLLM and others load it. Three tensors replace the weight of a layer NAME:

    NAME.weight_packed  int32[rows, cols * bits / 32], codes from the lowest bits of each word on
    NAME.weight_scale   [rows, groups], in the dtype of the weight
    NAME.weight_shape   int64[2]

The codes are those that the model was quantised to; nothing is rounded again.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from exporters import bits
from exporters.targets.compressed_tensors import CompressedResult
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import UsageError
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.families import HEAD
from thanos_deploy.model.tensorfile import INDEX
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.solver.codes import Quantised
from thanos_deploy.solver.grid import Grid

_WEIGHT = ".weight"


def export(
    checkpoint: Checkpoint,
    codes: Codes,
    destination: Path,
    *,
    on_progress: OnProgress = silent,
) -> CompressedResult:
    """Write the folder, with one file of weights in memory at a time.

    Args:
        checkpoint: the quantised model; its weights have the values that the codes stand for.
        codes: the codes of the same model.
        destination: an existing folder.
        on_progress: called after every file.

    Raises:
        UsageError: the format cannot hold the model; see `require_held`.
        InputError: the codes do not belong to the model.
    """
    require_held(checkpoint, codes.grid)
    copy_companions(checkpoint.folder, destination, None)
    config = loads((destination / "config.json").read_bytes())
    config["quantization_config"] = _entry(codes.grid)
    files.write_json(destination / "config.json", config)
    layers = {checkpoint.stored_name(f"{name}{_WEIGHT}"): name for name in checkpoint.linears}
    shards = sorted(set(checkpoint.weights.files.values()))
    weight_map, before = {}, 0
    on_progress(0, len(shards))
    for number, shard in enumerate(shards, 1):
        before += (checkpoint.folder / shard).stat().st_size
        parts: dict[str, Tensor] = {}
        for name in (name for name, file in checkpoint.weights.files.items() if file == shard):
            (weight,) = checkpoint.weights.read([name]).values()
            if name in layers:
                own = _parts(codes.of(layers[name], weight), weight.dtype)
                parts |= {name.removesuffix(_WEIGHT) + end: one for end, one in own.items()}
            else:
                parts[name] = weight
        save_file(parts, destination / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(parts, shard))
        on_progress(number, len(shards))
    after = sum((destination / shard).stat().st_size for shard in shards)
    if len(shards) > 1:
        index = {"metadata": {"total_size": after}, "weight_map": weight_map}
        files.write_json(destination / INDEX, index)
    return CompressedResult(
        grid=str(codes.grid),
        layers=len(layers),
        bytes_before=before,
        bytes_after=after,
        ratio=round(after / before, 4),
    )


def require_held(checkpoint: Checkpoint, grid: Grid) -> None:
    """Refuse a model or a grid that the format cannot hold.

    Raises:
        UsageError: stock loaders do not take the model or the grid; weights are stored as
            [inputs, outputs], or as one tensor for all experts; or the inputs of a layer do not
            divide into whole groups.
    """
    if not grid.symmetric:
        raise UsageError(
            f"{grid}: transformers does not load zero points in this format (5.23 with "
            "compressed-tensors 0.20)",
            fix="prune again with --quantize without :asym, or use --target onnx",
        )
    if block_widths.declared(checkpoint.folder) is not None:
        raise UsageError(
            f"{checkpoint.folder}: the blocks differ in width, which stock loaders do not support",
            fix="prune again with --allocation uniform",
        )
    if checkpoint.weights.parts:
        raise UsageError(
            f"{checkpoint.folder}: files of type {checkpoint.config.model_type} store the "
            "matrices of all experts in one tensor, which compressed-tensors does not "
            "support",
            fix="use --target onnx",
        )
    if checkpoint.family.transposed:
        raise UsageError(
            f"{checkpoint.folder}: models of type {checkpoint.config.model_type} store "
            "weights as [inputs, outputs], which compressed-tensors does not support",
            fix="use --target onnx",
        )
    for name in checkpoint.linears:
        _, cols = checkpoint.weights.shapes[checkpoint.stored_name(f"{name}{_WEIGHT}")]
        if cols % grid.width(cols):
            raise UsageError(
                f"{name}: {cols} inputs do not divide into the groups of {grid.group} of "
                f"{grid}, as compressed-tensors requires",
                fix=f"prune again with --quantize int{grid.bits}:32",
            )


def _entry(grid: Grid) -> Json:
    """The entry `quantization_config` of config.json."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [HEAD],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": grid.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if grid.group is None else "group",
                    "group_size": grid.group,
                    "dynamic": False,
                },
            }
        },
    }


def _parts(quantised: Quantised, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that replace a weight, by suffix of their name."""
    codes = quantised.codes.numpy() + 2 ** (quantised.grid.bits - 1)
    return {
        ".weight_packed": _words(codes, quantised.grid.bits),
        ".weight_scale": quantised.scale.to(dtype),
        ".weight_shape": torch.tensor(quantised.codes.shape),
    }


def _words(codes: NDArray[np.int16], width: int) -> Tensor:
    """Pack codes into int32[rows, words]; the last word of a row is padded with zero bits."""
    packed = bits.pack(codes, width)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))
