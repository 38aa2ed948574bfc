"""Convert gpt_oss checkpoints in MXFP4 to checkpoints with ordinary bfloat16 weights.

The published checkpoints have two uint8 tensors for each tensor of experts. For `gate_up_proj`:

    gate_up_proj_blocks  [experts, outputs, inputs / 32, 16]: two 4-bit numbers (E2M1) in each byte,
                         the first one in the lower half
    gate_up_proj_scales  [experts, outputs, inputs / 32]: for each block of 32 numbers the exponent
                         of the power of two that they are multiplied by, plus 127

Every resulting value is exact in bfloat16.

Source: the MX specification of the Open Compute Project, and `convert_moe_packed_tensors` of
transformers, which does the conversion here.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from thanos_deploy.bundle import files
from thanos_deploy.errors import ModelError
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.tensorfile import DTYPES, INDEX, Entry, Kind, TensorFile, entries
from thanos_deploy.model.weights import shards

_BLOCKS, _SCALES = "_blocks", "_scales"

# Numbers in a block; two of them share a byte.
_BLOCK = 32


def is_mxfp4(folder: Path) -> bool:
    """Return whether a folder has a model of the type gpt_oss with MXFP4 weights."""
    if files.peek_json(folder / "config.json").get("model_type") != "gpt_oss":
        return False
    try:
        return any(
            name.endswith(_BLOCKS) for shard in shards(folder) for name in entries(folder / shard)
        )
    except ModelError:
        return False  # the error is reported when the model is opened


def write_bfloat16(folder: Path, destination: Path) -> None:
    """Write an MXFP4 folder with bfloat16 weights, one expert's matrix in memory at a time.

    Args:
        folder: a folder for which `is_mxfp4` is true.
        destination: the folder to create.

    Raises:
        ModelError: blocks have no scales, or scales of another dtype or shape.
    """
    destination.mkdir()
    copy_companions(folder, destination, torch.bfloat16)
    found = {shard: entries(folder / shard) for shard in shards(folder)}
    places = {name: shard for shard, stored in found.items() for name in stored}
    written: dict[str, str] = {}
    for shard, stored in found.items():
        kinds: dict[str, Kind] = {}
        for name, entry in stored.items():
            if name.endswith(_BLOCKS):
                scales = name.removesuffix(_BLOCKS) + _SCALES
                _require_pair(folder, entry, found.get(places.get(scales, ""), {}).get(scales))
                experts, outputs, blocks, _ = entry.shape
                whole = (experts, _BLOCK * blocks, outputs)
                kinds[name.removesuffix(_BLOCKS)] = (torch.bfloat16, whole)
            elif not name.endswith(_SCALES) and entry.dtype in DTYPES:
                kinds[name] = (DTYPES[entry.dtype], entry.shape)
        if not kinds:
            continue
        written.update(dict.fromkeys(kinds, shard))
        with (
            TensorFile.create(destination / shard, kinds) as file,
            TensorFile.open(folder / shard) as source,
        ):
            for name in kinds:
                if name in stored:
                    file.write(name, source.read(name))
                    continue
                scales = name + _SCALES
                with TensorFile.open(folder / places[scales]) as beside:
                    for number, expert in enumerate(_experts(source, beside, name)):
                        file.write(name, expert, number * expert.numel())
    if (folder / INDEX).exists():
        files.write_json(destination / INDEX, {"metadata": {}, "weight_map": written})


def _experts(blocks: TensorFile, scales: TensorFile, name: str) -> Iterator[Tensor]:
    """Yield the matrix of each expert, bfloat16[inputs, outputs]."""
    (_, shape), (_, few) = blocks.kinds[name + _BLOCKS], scales.kinds[name + _SCALES]
    size, count = math.prod(shape[1:]), math.prod(few[1:])
    for number in range(shape[0]):
        of_blocks = blocks.read(name + _BLOCKS, number * size, (number + 1) * size)
        of_scales = scales.read(name + _SCALES, number * count, (number + 1) * count)
        yield convert_moe_packed_tensors(
            of_blocks.reshape(1, *shape[1:]), of_scales.reshape(1, *few[1:])
        )


def _require_pair(folder: Path, blocks: Entry, scales: Entry | None) -> None:
    """Refuse blocks without their scales.

    Raises:
        ModelError: the scales are missing or of another shape, or one of the two is not uint8.
    """
    fits = (
        scales is not None
        and {blocks.dtype, scales.dtype} == {"U8"}
        and len(blocks.shape) == 4
        and blocks.shape == (*scales.shape, _BLOCK // 2)
    )
    if not fits:
        seen = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ModelError(
            f"{folder}: {blocks.name} is {blocks.dtype} {list(blocks.shape)}, and its scales are "
            f"{seen}, which is not MXFP4",
            fix="fetch the checkpoint again and compare its hashes",
        )
