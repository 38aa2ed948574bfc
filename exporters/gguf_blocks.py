"""The codes of a quantised model in the blocks of a GGUF file, instead of codes rounded anew.

A block of ggml (ggml/src/ggml-common.h) has 32 neighbouring inputs: a float16 scale, then for Q8_0
32 signed bytes, and for Q4_0 16 bytes with the codes plus 8, those of inputs 0 to 15 in the lower
halves and those of inputs 16 to 31 in the upper ones. Both are exactly a symmetric grid in groups
of 32. Q4_1 has another float16 after the scale, the value of code 0, and codes from 0 on: the grid
of 4 bits with zero points, whose scale * zero float16 has. Blocks of a larger group have its scale
each, and codes of 4 bits are codes of 8 bits as well.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.packages import load
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.solver.codes import Quantised
from thanos_deploy.solver.grid import Grid

_BLOCK = 32

# dtype of the file -> the type of its tensors, and the finest grid that this type holds exactly.
_HOLDS = {
    "q8_0": ("Q8_0", Grid(8, _BLOCK)),
    "q4_0": ("Q4_0", Grid(4, _BLOCK)),
    "q4_1": ("Q4_1", Grid(4, _BLOCK, symmetric=False)),
}


def holds(dtype: str, grid: Grid) -> bool:
    """A file of this dtype can have the codes of this grid."""
    if dtype not in _HOLDS:
        return False
    finest = _HOLDS[dtype][1]
    return (
        grid.symmetric == finest.symmetric
        and grid.bits <= finest.bits
        and (grid.group is None or grid.group % _BLOCK == 0)
    )


def smallest(grid: Grid) -> str | None:
    """The dtype of the smallest file that can have the codes of this grid; None for none."""
    return next((dtype for dtype in reversed(_HOLDS) if holds(dtype, grid)), None)


def put(exact: Path, stored: Path, checkpoint: Checkpoint, codes: Codes, dtype: str) -> int:
    """Write the codes over those that were rounded.

    The converter puts rows into another order for some models. Where each went is seen in the file
    of values: rows of one value are rows of one code.

    Args:
        exact: the file in float32.
        stored: the same in a dtype that `holds` the grid; changed in place.
        checkpoint: the model.
        codes: its codes.
        dtype: of the stored file.

    Returns:
        how many layers have their codes now; the others are stored in another type.
    """
    gguf = load("gguf")
    values, file = gguf.GGUFReader(exact), gguf.GGUFReader(stored, "r+")
    kind = str(values.get_field("general.architecture").contents())
    (architecture,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, len(checkpoint.blocks))
    before, after = ({one.name: one for one in each.tensors} for each in (values, file))
    done = 0
    for name in checkpoint.linears:
        there = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if after[there].tensor_type.name != _HOLDS[dtype][0]:
            continue
        weight = checkpoint.linear(name)
        order = _order(weight.float().numpy(), before[there].data)
        after[there].data[:] = blocks(codes.of(name, weight), dtype)[order]
        done += 1
    file.data.flush()
    return done


def blocks(quantised: Quantised, dtype: str) -> NDArray[np.uint8]:
    """uint8[rows, bytes], a matrix as ggml stores it."""
    quantised = quantised.grouped(_BLOCK)
    rows, cols = quantised.codes.shape
    codes = quantised.codes.numpy().reshape(rows, cols // _BLOCK, _BLOCK)
    head = [quantised.scale.numpy()]
    if dtype == "q4_1":
        head.append((-quantised.scale * quantised.zero).numpy())
    numbers = np.stack(head, axis=2).astype("<f2").view(np.uint8)
    if dtype == "q8_0":
        inputs = codes.astype(np.int8).view(np.uint8)
    else:
        lifted = (codes + (8 if dtype == "q4_0" else 0)).astype(np.uint8)
        inputs = lifted[:, :, :16] | (lifted[:, :, 16:] * np.uint8(16))
    return np.concatenate([numbers, inputs], axis=2).reshape(rows, -1)


def _order(rows: NDArray[np.float32], permuted: Any) -> list[int]:
    """Of each row of a permuted matrix, where it was."""
    places = {row.tobytes(): place for place, row in enumerate(rows)}
    return [places[np.asarray(row, dtype=np.float32).tobytes()] for row in permuted]
