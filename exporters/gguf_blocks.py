"""Write the codes of a quantised model into a GGUF file, in place of those llama.cpp rounded.

A block of ggml (ggml/src/ggml-common.h) holds 32 neighbouring inputs of a row:

    Q8_0  a float16 scale, then 32 signed bytes
    Q4_0  a float16 scale, then 16 bytes with code + 8; inputs 0 to 15 are in the lower halves of
          the bytes, inputs 16 to 31 in the upper halves
    Q4_1  a float16 scale, a float16 minimum (the value of code 0), then 16 bytes with codes from 0
          on, in the order of Q4_0

Q8_0 and Q4_0 hold exactly a symmetric grid in groups of 32. Q4_1 holds exactly a 4-bit grid with
zero points if scale * zero is exact in float16. A larger group is stored as several blocks with the
same scale, and Q8_0 also holds codes of 4 bits.
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

# Maps the dtype of a file to the type of its tensors and the finest grid that this type holds
# exactly.
_HOLDS = {
    "q8_0": ("Q8_0", Grid(8, _BLOCK)),
    "q4_0": ("Q4_0", Grid(4, _BLOCK)),
    "q4_1": ("Q4_1", Grid(4, _BLOCK, symmetric=False)),
}


def holds(dtype: str, grid: Grid) -> bool:
    """Whether a file of this dtype can hold the codes of this grid."""
    if dtype not in _HOLDS:
        return False
    finest = _HOLDS[dtype][1]
    return (
        grid.symmetric == finest.symmetric
        and grid.bits <= finest.bits
        and (grid.group is None or grid.group % _BLOCK == 0)
    )


def smallest(grid: Grid) -> str | None:
    """Return the dtype of the smallest file that can hold the codes of this grid, or None."""
    return next((dtype for dtype in reversed(_HOLDS) if holds(dtype, grid)), None)


def put(exact: Path, stored: Path, checkpoint: Checkpoint, codes: Codes, dtype: str) -> int:
    """Overwrite the codes that llama.cpp rounded with those of the model, in place.

    For some models the converter puts the rows of a matrix into another order. The order is found
    by matching rows of the checkpoint with rows of the float32 file; rows with equal values have
    equal codes.

    Args:
        exact: the GGUF file in float32.
        stored: the same model in a dtype that `holds` the grid; changed in place.
        checkpoint: the model.
        codes: the codes of the model.
        dtype: dtype of the stored file.

    Returns:
        The number of layers that have their codes now; llama.cpp stored the others in another type.
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
    """Encode a matrix as ggml stores it: uint8[rows, bytes]."""
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
    """For each row of a permuted matrix, its index in the original matrix."""
    places = {row.tobytes(): place for place, row in enumerate(rows)}
    return [places[np.asarray(row, dtype=np.float32).tobytes()] for row in permuted]
