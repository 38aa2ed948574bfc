"""Models with fewer blocks: the entries of their config.json and the names of their tensors.

The remaining blocks are renumbered without gaps. An entry with a value for each block loses the
values of the removed blocks.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from thanos_deploy.bundle.codec import Json
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import Family
from thanos_deploy.model.structure import blocks_of

_COUNT = "num_hidden_layers"

# Entries with a value for each block.
_LISTS = ("layer_types", "no_rope_layers")

# Entries of a mixture of experts: the numbers of the blocks without experts, and the step N if only
# every N-th block has experts.
_DENSE, _STEP = "mlp_only_layers", "decoder_sparse_step"

# Attribute with the number of a module's block, by which a KV cache is indexed.
_PLACE = "layer_idx"


def describe(checkpoint: Checkpoint, kept: Sequence[int]) -> Json:
    """Return the entries of config.json that describe a model with some of a checkpoint's blocks.

    Args:
        checkpoint: the whole model.
        kept: numbers of the remaining blocks in rising order, at least one.

    Returns:
        maps the name of an entry to its value.

    Raises:
        UsageError: a block would compute something else at its new position, for example because
            its scale depends on its number.
    """
    config, count = checkpoint.config, len(checkpoint.blocks)
    entries: Json = {_COUNT: len(kept)}
    for name in _LISTS:
        values = getattr(config, name, None)
        if values is not None and len(values) == count:
            entries[name] = [values[number] for number in kept]
    if getattr(config, _DENSE, None) is not None:
        routed = [bool(block.routed) for block in checkpoint.blocks]
        entries[_DENSE] = [new for new, old in enumerate(kept) if not routed[old]]
        entries[_STEP] = 1
    known = config.attribute_map or {}
    entries |= {known[name]: value for name, value in entries.items() if name in known}
    _require_same_blocks(checkpoint, kept, entries)
    return entries


def renamed(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, str]:
    """Map the old name of each tensor of the remaining blocks, as in the files, to its new name."""
    weights, family = checkpoint.weights, checkpoint.family
    names: dict[str, str] = {}
    for new, old in enumerate(kept):
        prefix = f"{family.blocks}.{old}."
        names |= {
            tensor: _numbered(tensor, family, old, new)
            for name, stored in weights.stored.items()
            if name.startswith(prefix)
            for tensor in [weights.stored_in(stored)]
        }
    return names


def _numbered(tensor: str, family: Family, old: int, new: int) -> str:
    blocks = family.blocks.rpartition(".")[2]
    return re.sub(rf"\b{re.escape(blocks)}\.{old}\.", f"{blocks}.{new}.", tensor, count=1)


def _require_same_blocks(checkpoint: Checkpoint, kept: Sequence[int], entries: Json) -> None:
    """Refuse blocks that would compute something else under the new configuration.

    Raises:
        UsageError: shapes or settings of a block's modules would change.
    """
    config: PretrainedConfig = type(checkpoint.config).from_dict(
        {**checkpoint.config.to_dict(), **entries}
    )
    fewer = dataclasses.replace(
        checkpoint,
        config=config,
        widths=tuple(checkpoint.widths[number] for number in kept),
        blocks=tuple(checkpoint.blocks[number] for number in kept),
    )
    whole, cut = (blocks_of(one.skeleton(), one.family) for one in (checkpoint, fewer))
    for new, old in enumerate(kept):
        before, after = _settings(whole[old]), _settings(cut[new])
        if before != after:
            name = next(name for name in before if before[name] != after.get(name))
            raise UsageError(
                f"{checkpoint.folder}: block {old} would change by becoming block {new}: "
                f"its {name} depends on the number of the block, and would be "
                f"{after.get(name)!r} instead of {before[name]!r}",
                fix="use --allocation uniform, which drops no block",
            )


def _settings(block: nn.Module) -> dict[str, Any]:
    """Collect the shapes of a block's parameters and the simple attributes of its modules."""
    found: dict[str, Any] = {
        name: tuple(parameter.shape) for name, parameter in block.named_parameters()
    }
    for name, module in block.named_modules():
        found |= {
            f"{name}.{key}".lstrip("."): value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key != _PLACE
        }
    return found
