"""y = x W^T + b with W 2:4, on a CPU: some rows of W at a time are unpacked and multiplied.

No dense copy of W is ever whole, so W takes 9/16 of its bytes in 16 bits (17/32 in 32 bits), and
the rows that are unpacked stay in the cache of a core until they are multiplied.

PyTorch has no instruction for what 2:4 needs, so its operators have to work on long runs of
entries. The four columns of every group are therefore kept apart: kept values are two planes, first
and second [rows, groups], the unpacked rows are four, and x is put into the same order of columns.
Column c of a group holds, by the bits of its mask, what `runtime.kernels.prefill` says.
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

# Of unpacked rows. Fewer take longer in calls of operators, more leave the cache of a core.
_BYTES_AT_ONCE = 1 << 20


def hold(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Pack a 2:4 matrix.

    Args:
        weight: one of `DTYPES` [rows, columns], 2:4 along the columns.
        name: for the message.

    Returns:
        planes and codes; see `from_packed`.

    Raises:
        InputError: another dtype.
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
    """What `thanos_deploy.model.packing.pack` returns at 2:4, in the order that is multiplied.

    Args:
        values: [rows, columns / 2].
        mask: uint8[rows, ceil(columns / 8)].

    Returns:
        planes [2, rows, groups], the first and the second kept value of every group; and codes
        uint8[rows, ceil(groups / 2)], the four bits of group g in the lower half of byte g, or in
        the upper half of byte g - ceil(groups / 2).
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
        x: the weight's dtype [tokens, inputs].
        planes, codes: of the weight [outputs, inputs]; see `from_packed`.
        bias: [outputs].

    Returns:
        the weight's dtype [tokens, outputs].
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
    """Write some rows [rows, four columns, groups].

    Entries are selected by integer instructions on their bits, because PyTorch runs those on whole
    vectors, and `torch.where` entry by entry at some fifteen times the time.
    """
    first, second = planes.view(_BITS[planes.element_size()])
    groups = first.shape[1]
    halves = codes.view(torch.int8)
    # Of two groups in a byte the upper one's bits are four places higher.
    whole = torch.cat([halves << 4, halves], dim=1)[:, :groups]
    # All bits where the column is kept, or none: its bit becomes the sign, which is drawn out.
    kept = [((whole << (3 - column)) >> 7).to(first.dtype) for column in range(GROUP)]
    columns = out.view(first.dtype).unbind(dim=1)
    differ = first ^ second
    torch.bitwise_and(first, kept[0], out=columns[0])
    torch.bitwise_and(second, kept[3], out=columns[3])
    torch.bitwise_and(differ & kept[0] ^ first, kept[1], out=columns[1])
    torch.bitwise_and(differ & kept[3] ^ second, kept[2], out=columns[2])
