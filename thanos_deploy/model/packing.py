"""Lossless packing of n:m sparse weights: the kept values and a bit mask of their positions.

A packed folder holds the model's own configuration and tokenizer, `packed.json`, and for every
`NAME.safetensors` of the model a `NAME.packed.safetensors`. In that file a weight W [rows, cols] of
which n of every m entries are kept is two tensors:

    W.values  [rows, cols * n / m], in W's own dtype: the n kept entries of every m columns
    W.mask    uint8[rows, ceil(cols / 8)]: bit c % 8 (bit 0 is the lowest) of byte c // 8 is set if
              column c is kept; exactly n bits in every group of m

2:4 in float16 takes 9/16 of the dense size, in int8 5/8. If a group has more than m - n zeros, some
kept entries are zero. All other tensors are stored as they are. A weight that is stored [inputs,
outputs] (GPT-2) is packed transposed, so that groups always run along the rows. `packed.json` names
the packed weights, their pattern, and the SHA-256 of every file and of its own content.

The files are not called `model.safetensors`, because loaders that do not know the layout would take
the missing weights for new ones and fill them with random numbers.

`packed_folder` also reads checkpoints in the format `sparse-24-bitmask`, which compressed-tensors
wrote before it dropped the format. They have the same two tensors (`compressed`, `bitmask`) and a
third one with the shape.
"""

import math

import numpy as np
import torch
from torch import Tensor

from thanos_deploy.errors import ModelError
from thanos_deploy.pattern import SemiStructured

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Entries processed at once: choosing the kept entries needs some 30 bytes for each entry.
_ENTRIES_AT_ONCE = 1 << 22

# For each library behind torch's semi-structured tensors and each dtype that it takes: the numbers
# of which rows and columns must be multiples. For CUTLASS torch also lists float32, but keeps one
# of every two entries there, which is not 2:4.
SEMI_STRUCTURED_MULTIPLES = {
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)},
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (32, 32)},
}


def pack(weight: Tensor, pattern: SemiStructured, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Pack a weight that holds an n:m pattern, on the device of the weight.

    Args:
        weight: [rows, cols] of any dtype of at most 8 bytes; groups run along the rows.
        pattern: the pattern. A zero is an entry whose bits are all 0, so -0.0 is kept.
        name: name of the weight for the error message.

    Returns:
        values [rows, cols * kept / group] and mask uint8[rows, ceil(cols / 8)].

    Raises:
        ModelError: the weight does not hold the pattern.
    """
    require_pattern(weight, pattern, name)
    parts = [_packed_part(part, pattern) for part in _parts(weight)]
    return torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts])


def require_pattern(weight: Tensor, pattern: SemiStructured, name: str = "weight") -> None:
    """Refuse a weight that does not hold the pattern.

    A weight that holds it costs a single transfer of one number from the device to the host.

    Raises:
        ModelError: the weight does not hold the pattern; the message names the first group with too
            many non-zeros.
    """
    cols = weight.shape[1]
    kept, group = pattern.kept, pattern.group
    if cols % group:
        raise ModelError(
            f"{name}: {cols} columns are not a multiple of {group}, so it does not hold {pattern}",
            fix="pack a model that was pruned to the pattern",
        )
    over = [_present(part, group).sum(dim=1, dtype=torch.int32) > kept for part in _parts(weight)]
    number = int(torch.stack([part.sum() for part in over]).sum()) if over else 0
    if number:
        row, first = divmod(int(torch.cat(over).to(torch.uint8).argmax()) * group, cols)
        raise ModelError(
            f"{name}: {number} groups of {group} have more than {kept} entries that are not 0, "
            f"the first in row {row} from column {first} on, so it does not hold {pattern}",
            fix="pack a model that was pruned to the pattern",
        )


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Split a weight into parts of some rows."""
    parts: tuple[Tensor, ...] = weight.split(max(1, _ENTRIES_AT_ONCE // max(weight.shape[1], 1)))
    return parts


def _present(part: Tensor, group: int) -> Tensor:
    """Return a mask of the entries that are not zero, bool[groups, group]."""
    return (part.contiguous().view(_BITS[part.element_size()]) != 0).reshape(-1, group)


def _packed_part(part: Tensor, pattern: SemiStructured) -> tuple[Tensor, Tensor]:
    """Return the kept entries of some rows that hold the pattern, and the bit mask."""
    rows, cols = part.shape
    kept, group = pattern.kept, pattern.group
    present = _present(part, group)
    # Keep the non-zeros, and fill up with the first zeros of the group.
    free = kept - present.sum(dim=1, keepdim=True, dtype=torch.int32)
    keep = present | (present.logical_not().cumsum(dim=1, dtype=torch.int32) <= free)
    # Index to scatter each entry to: kept entries in their order, all others to one last column.
    place = torch.where(keep, keep.cumsum(dim=1, dtype=torch.int32) - 1, kept).long()
    entries = part.reshape(-1, group)
    values = entries.new_empty(len(entries), kept + 1).scatter_(1, place, entries)[:, :kept]
    return values.reshape(rows, -1), _bits(keep.reshape(rows, cols))


def _bits(keep: Tensor) -> Tensor:
    """Pack bool[rows, cols] into bits, uint8[rows, ceil(cols / 8)], the first column lowest."""
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8))
    # Eight bytes that are 0 or 1 become one byte: a shift by 56 - 7 i makes byte i bit 56 + i.
    # No two of the 64 partial products fall on the same bit, so there is no carry.
    return ((keep.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(values: Tensor, mask: Tensor, cols: int, name: str = "weight") -> Tensor:
    """Return the weight [rows, cols] that `pack` packed, bit by bit the same, on the CPU.

    Raises:
        ModelError: the mask does not fit the values.
    """
    if (
        values.dim() != 2
        or mask.dtype != torch.uint8
        or tuple(mask.shape) != (len(values), math.ceil(cols / 8))
    ):
        raise ModelError(
            f"{name}: values {list(values.shape)} and {mask.dtype} mask {list(mask.shape)} "
            f"do not fit together to {cols} columns",
            fix="the checkpoint is damaged; fetch it again",
        )
    weight = values.new_zeros(len(values), cols)
    step = max(1, _ENTRIES_AT_ONCE // max(cols, 1))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        bits = np.unpackbits(mask[rows].numpy(), axis=1, bitorder="little")
        where = torch.from_numpy(bits[:, :cols]).bool()
        if not bool((where.sum(dim=1) == values.shape[1]).all()) or bits[:, cols:].any():
            raise ModelError(
                f"{name}: a row of the mask does not keep {values.shape[1]} of {cols} columns",
                fix="the checkpoint is damaged; fetch it again",
            )
        weight[rows][where] = values[rows].flatten()
    return weight


def unpack_anywhere(values: Tensor, mask: Tensor, cols: int) -> Tensor:
    """Do what `unpack` does on any device, without a check that the mask fits the values.

    Args:
        values, mask: as `pack` returned them.
        cols: columns of the weight.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep = ((mask[:, :, None] >> shifts) & 1).reshape(len(mask), -1)[:, :cols].bool()
    weight = values.new_zeros(len(values), cols)
    weight[keep] = values.reshape(-1)
    return weight


def require_semi_structured(weight: Tensor, library: str, name: str = "weight") -> None:
    """Refuse a weight that torch's semi-structured tensors cannot hold.

    The message of torch's own check of the shape names no layer. A weight that is not 2:4 is not
    refused by torch, which silently loses the entries that do not fit.

    Args:
        weight: [rows, cols].
        library: a key of `SEMI_STRUCTURED_MULTIPLES`.
        name: name of the weight for the error message.

    Raises:
        ModelError: the library does not take the dtype or the shape, or the weight is not 2:4.
    """
    taken = SEMI_STRUCTURED_MULTIPLES[library]
    multiples = taken.get(weight.dtype)
    if multiples is None or any(
        size == 0 or size % multiple for size, multiple in zip(weight.shape, multiples, strict=True)
    ):
        raise ModelError(
            f"{name}: {library} does not support a 2:4 weight of {weight.dtype} "
            f"{list(weight.shape)}",
            fix="use a weight of "
            + "; ".join(
                f"{dtype} with multiples of {rows} x {cols}"
                for dtype, (rows, cols) in taken.items()
            ),
        )
    require_pattern(weight, SemiStructured(2, 4), name)


def to_cutlass(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Compress a 2:4 weight as torch's semi-structured tensors do for CUTLASS.

    Args:
        weight: float16, bfloat16 or int8 [rows, cols].
        name: name of the weight for the error message.

    Returns:
        values [rows, cols / 2] and the metadata in the order in which the kernels read it.

    Raises:
        ModelError: the weight is not 2:4, or the kernels do not take its dtype or shape.
    """
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
    )

    require_semi_structured(weight, "cutlass", name)
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return values, metadata


def from_cutlass(values: Tensor, metadata: Tensor) -> Tensor:
    """Return the dense weight that `to_cutlass` compressed."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)
    return weight
