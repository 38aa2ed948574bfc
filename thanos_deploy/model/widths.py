"""Widths of a model's blocks: attention heads and feed-forward channels.

A stock config.json has one number for all blocks, and in some families the number of heads cannot
change without the hidden size. A model that a stock config.json cannot describe keeps the
config.json of the model that it was cut from, and declares its widths in widths.json beside it.
Stock loaders refuse such a folder because the shapes of its weights differ; `load.load_model` reads
it.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig

from thanos_deploy.bundle.codec import UnknownFormatError, decode_format, loads
from thanos_deploy.bundle.files import write_record
from thanos_deploy.errors import ModelError
from thanos_deploy.model import linear
from thanos_deploy.model.block import Widths as Widths
from thanos_deploy.model.families import Experts, Family, Width

FILE = "widths.json"

_CONFIG = "config."
FORMAT = 1


@dataclass(frozen=True, slots=True)
class _Table:
    """The content of widths.json: the widths of each block."""

    format: int
    blocks: tuple[Widths, ...]


def of_config(config: PretrainedConfig, family: Family) -> Widths:
    """Return the widths of every block in a stock configuration; 1 of each if heads are unknown."""
    if family.discovered:
        return Widths(heads=1, kv_heads=1, channels=1)
    heads = int(getattr(config, family.heads.count))
    kv_count = family.heads.kv_count
    return Widths(
        heads=heads,
        kv_heads=heads if kv_count is None else int(getattr(config, kv_count)),
        channels=int(
            getattr(config, family.channels.count)
            or (family.channels.multiple or 0) * config.hidden_size
        ),
    )


def with_experts(config: PretrainedConfig, family: Family, routed: bool) -> Widths:
    """Return the widths of a block of a family with experts.

    Args:
        config: configuration of the model.
        family: family of the model.
        routed: whether the block has experts; otherwise it has a dense feed-forward network.
    """
    dense = of_config(config, family)
    if not routed or family.experts is None:
        return dense
    names = family.experts
    channels, count = (int(getattr(config, entry)) for entry in (names.channels, names.count))
    return Widths(dense.heads, dense.kv_heads, channels, count)


def head_size(config: PretrainedConfig) -> int:
    """Return the number of channels of one attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def describe(
    config: PretrainedConfig, family: Family, blocks: Sequence[Widths]
) -> dict[str, int] | None:
    """Return the entries of a stock config.json that describe a model with these widths.

    Args:
        config: configuration of the original model.
        family: family of the model.
        blocks: widths of each block.

    Returns:
        maps the name of an entry to its value. None if no stock configuration of this family
        describes the widths: the blocks differ, the number of heads differs and the family has no
        entry for the size of a head, or the configuration class refuses the numbers.
    """
    if family.experts is not None:
        return _of_experts(config, family.experts, blocks)
    old, new = of_config(config, family), blocks[0]
    if any(block != new for block in blocks):
        return None
    entries = {family.channels.count: new.channels}
    if (new.heads, new.kv_heads) != (old.heads, old.kv_heads):
        if not family.heads.free_size:
            return None
        entries |= {family.heads.count: new.heads, "head_dim": head_size(config)}
        if family.heads.kv_count is not None:
            entries[family.heads.kv_count] = new.kv_heads
    try:
        type(config).from_dict({**config.to_dict(), **entries})
    except StrictDataclassError:
        return None
    return entries


def _of_experts(
    config: PretrainedConfig, names: Experts, blocks: Sequence[Widths]
) -> dict[str, int] | None:
    """Return the entries for experts; None unless all blocks with experts have the same widths."""
    found = {(block.experts, block.channels) for block in blocks if block.experts}
    if len(found) != 1:
        return None
    ((count, channels),) = found
    known = config.attribute_map or {}
    aliases = {one for pair in known.items() if names.count in pair for one in pair}
    written = {name: count for name in (names.count, *sorted(aliases))}
    return {**written, names.channels: channels}


def declare(folder: Path, blocks: Sequence[Widths]) -> None:
    """Write widths.json."""
    write_record(folder / FILE, _Table(FORMAT, tuple(blocks)))


def declared(folder: Path) -> tuple[Widths, ...] | None:
    """Read the widths of each block from a folder's widths.json; None if there is no such file.

    Raises:
        ModelError: the file cannot be understood.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        blocks = decode_format(_Table, loads(path.read_bytes()), FORMAT).blocks
    except UnknownFormatError as error:
        raise ModelError(
            f"{path}: {error}", fix="use the version of thanos-deploy that wrote it, or a newer one"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not a readable table of widths ({error})",
            fix="restore the file from the model's origin",
        ) from error
    # A dense block has no experts.
    if any(min(one.heads, one.kv_heads, one.channels) < 1 or one.experts < 0 for one in blocks):
        raise ModelError(
            f"{path}: a width is not a positive number",
            fix="restore the file from the model's origin",
        )
    return blocks


def resize(blocks: nn.ModuleList, family: Family, widths: Sequence[Widths], size: int) -> None:
    """Resize the layers of the blocks of a model without weights.

    Args:
        blocks: the model's blocks, on the meta device.
        family: family of the model.
        widths: the new widths of each block.
        size: channels of one attention head.
    """
    for block, width in zip(blocks, widths, strict=True):
        for name, outputs in (
            *zip(family.heads.producers, producer_rows(family, width, size), strict=True),
            *((name, family.channels.rows * width.channels) for name in family.channels.producers),
        ):
            layer = block.get_submodule(name)
            linear.resize(layer, outputs, linear.matrix(layer).shape[1])
        for name, inputs in (
            (family.heads.consumer, width.heads * size),
            (family.channels.consumer, width.channels),
        ):
            layer = block.get_submodule(name)
            linear.resize(layer, linear.matrix(layer).shape[0], inputs)
        fit_attention(block, family, width, size)


def producer_rows(family: Family, width: Widths, size: int) -> tuple[int, ...]:
    """Return the rows of each layer in `family.heads.producers`, in the same order.

    Args:
        family: family of the model.
        width: widths of the block.
        size: channels of one attention head.
    """
    queries, keys = width.heads * size, width.kv_heads * size
    if family.heads.layout == "separate":
        return (queries, keys, keys)
    return (queries + 2 * keys,)


def fit_attention(block: nn.Module, family: Family, width: Widths, size: int) -> None:
    """Set the attributes in which a block's attention module stores its widths.

    Args:
        block: the block.
        family: family of the model.
        width: widths of the block.
        size: channels of one attention head.
    """
    attention: Any = block.get_submodule(family.heads.module)
    values: dict[Width, int] = {
        "heads": width.heads,
        "keys": width.kv_heads,
        "heads per key": width.heads // width.kv_heads,
        "channels": width.heads * size,
    }
    for attribute, kept in family.heads.kept.items():
        holder: Any = attention
        if attribute.startswith(_CONFIG):
            holder = attention.config = copy(attention.config)  # other blocks share it
        setattr(holder, attribute.removeprefix(_CONFIG), values[kept])
