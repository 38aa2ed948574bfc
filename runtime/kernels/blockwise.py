"""y = x W^T + b with W 2:4 on a CPU: a block of rows of W is unpacked and multiplied at a time.

There is never a dense copy of all of W, so W takes 9/16 of its dense bytes in 16-bit dtypes (17/32
in float32). The unpacked rows stay in the cache of a core until they are multiplied.

PyTorch has no operator for 2:4, and its elementwise operators are fast only on long runs of
entries. So the layout keeps the columns of a group in separate planes: the first and the second
kept value of every group are two planes [rows, groups], the unpacked rows are four, and x is
reordered to match. `runtime.kernels.prefill` says how the mask bits of a group give the values of
its columns.
"""

import torch
from torch import Tensor

from thanos_deploy.errors import InputError
from thanos_deploy.model.packing import pack
from thanos_deploy.pattern import SemiStructured

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

GROUP = 4
_KEPT = 2

_BITS = {2: torch.int16, 4: torch.int32}

# Bytes of a block of unpacked rows: a smaller block spends more time in calls of operators, a
# larger one does not fit the cache of a core.
_BYTES_AT_ONCE = 1 << 20


def hold(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Pack a 2:4 matrix.

    Args:
        weight: [rows, columns] with a dtype of `DTYPES`, 2:4 along the columns.
        name: name of the weight, for the message of an error.

    Returns:
        Planes and codes; see `from_packed`.

    Raises:
        InputError: the dtype is not one of `DTYPES`.
        ModelError: the weight is not 2:4.
    """
    if weight.dtype not in DTYPES:
        raise InputError(
            f"{name}: the blockwise product does not support {weight.dtype}",
            fix=f"use one of {', '.join(map(str, DTYPES))}",
        )
    values, mask = pack(weight.detach(), SemiStructured(_KEPT, GROUP), name)
    return from_packed(values, mask)


def from_packed(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Reorder a weight that `thanos_deploy.model.packing.pack` packed at 2:4 for `linear`.

    Args:
        values: [rows, columns / 2].
        mask: uint8[rows, ceil(columns / 8)].

    Returns:
        Planes [2, rows, groups], the first and the second kept value of every group; and codes
        uint8[rows, ceil(groups / 2)], with the four mask bits of group g in the lower half of byte
        g or, for the second half of the groups, in the upper half of byte g - ceil(groups / 2).
    """
    rows, kept = values.shape
    groups = kept // _KEPT
    planes = values.view(rows, groups, _KEPT).permute(2, 0, 1).contiguous()
    codes = torch.stack([mask & 15, mask >> 4], dim=2).view(rows, -1)
    half = -(-groups // 2)
    low = codes[:, :half]
    high = torch.nn.functional.pad(codes[:, half:groups], (0, 2 * half - groups))
    return planes, low | (high << 4)


def linear(x: Tensor, planes: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: [tokens, inputs] in the weight's dtype.
        planes, codes: the weight [outputs, inputs] as `from_packed` returns it.
        bias: [outputs].

    Returns:
        [tokens, outputs] in the weight's dtype.
    """
    _, rows, groups = planes.shape
    tokens = len(x)
    by_plane = x.reshape(tokens, groups, GROUP).transpose(1, 2).reshape(tokens, -1)
    y = x.new_empty(tokens, rows)
    step = max(1, min(rows, _BYTES_AT_ONCE // (GROUP * groups * x.itemsize)))
    dense = x.new_empty(step, GROUP, groups)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = dense[: stop - start]
        _unpack(planes[:, start:stop], codes[start:stop], block)
        y[:, start:stop] = by_plane @ block.view(stop - start, -1).T
    return y if bias is None else y.add_(bias)


def _unpack(planes: Tensor, codes: Tensor, out: Tensor) -> None:
    """Unpack some rows into `out` [rows, four columns, groups].

    Entries are selected by bitwise operations, because PyTorch vectorises those; `torch.where`
    works entry by entry and takes some fifteen times as long.
    """
    first, second = planes.view(_BITS[planes.element_size()])
    groups = first.shape[1]
    halves = codes.view(torch.int8)
    # The mask bits of every group in bits 4 to 7 of a byte: those of the lower halves are shifted.
    whole = torch.cat([halves << 4, halves], dim=1)[:, :groups]
    # For each column all bits set where it is kept, else none: the column's mask bit is shifted to
    # the sign bit, and an arithmetic right shift spreads it.
    kept = [((whole << (3 - column)) >> 7).to(first.dtype) for column in range(GROUP)]
    columns = out.view(first.dtype).unbind(dim=1)
    differ = first ^ second
    torch.bitwise_and(first, kept[0], out=columns[0])
    torch.bitwise_and(second, kept[3], out=columns[3])
    torch.bitwise_and(differ & kept[0] ^ first, kept[1], out=columns[1])
    torch.bitwise_and(differ & kept[3] ^ second, kept[2], out=columns[2])
