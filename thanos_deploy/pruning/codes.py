"""The files with the codes of a quantised model, one for each block.

For each layer, a file holds `NAME.codes`, int8[rows, cols] or, for an asymmetric grid, uint8;
`NAME.scale`, float16[rows, groups]; and, for an asymmetric grid, `NAME.zero`, uint8[rows, groups].
The metadata of each file name the grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thanos_deploy.errors import InputError, ModelError, UsageError
from thanos_deploy.model.rounding import rounded
from thanos_deploy.solver.codes import Quantised
from thanos_deploy.solver.grid import Grid, parse

# Suffixes of the names of a layer's tensors in these files, and the metadata entry for the grid.
_CODES, _SCALE, _ZERO = ".codes", ".scale", ".zero"
_GRID = "grid"


def tensors_of(name: str, layer: Quantised) -> dict[str, Tensor]:
    """The tensors that the files hold for a layer, by name, on the host."""
    kind = torch.int8 if layer.grid.symmetric else torch.uint8
    tensors = {
        name + _CODES: layer.codes.to("cpu", kind),
        name + _SCALE: layer.scale.to("cpu", torch.float16),
    }
    if not layer.grid.symmetric:
        tensors[name + _ZERO] = layer.zero.to("cpu", torch.uint8)
    return tensors


def save(folder: Path, index: int, grid: Grid, tensors: Mapping[str, Tensor]) -> None:
    """Write the file of one block; tensors whose names have other suffixes are left out."""
    found = {name: one for name, one in tensors.items() if name.endswith((_CODES, _SCALE, _ZERO))}
    save_file(found, folder / f"{index:05}.safetensors", metadata={_GRID: str(grid)})


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The codes of a quantised model, one layer in memory at a time.

    Attributes:
        folder: the folder with the files.
        grid: the grid that the model was quantised to.
        files: maps the name of a tensor to the file that holds it.
    """

    folder: Path
    grid: Grid
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Codes":
        """Read the names of the tensors and the grid from the files, but no tensor.

        Raises:
            InputError: a file is not readable, there is no file, or the files name several grids.
        """
        grids, found = set(), {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    grids.add(parse(file.metadata()[_GRID]))
                    found.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, UsageError) as error:
            raise _unreadable(folder, f"not readable: {error}") from error
        if not grids:
            raise _unreadable(folder, "there are no codes (*.safetensors)")
        if len(grids) > 1:
            names = ", ".join(sorted(map(str, grids)))
            raise _unreadable(folder, f"the files name different grids: {names}")
        return cls(folder, grids.pop(), found)

    def of(self, name: str, weight: Tensor) -> Quantised:
        """The codes of a layer, with scales in float32.

        Args:
            name: full name of the layer.
            weight: [rows, cols], as it is stored in the checkpoint.

        Raises:
            InputError: the layer is not there, or its weight does not match the codes.
        """
        try:
            codes, scale = (self._read(name + part) for part in (_CODES, _SCALE))
            zero = torch.zeros_like(scale) if self.grid.symmetric else self._read(name + _ZERO)
            quantised = Quantised(self.grid, codes.to(torch.int16), scale.float(), zero.float())
            same = rounded(quantised.weight, weight.dtype, name).equal(weight)
        except (OSError, SafetensorError, KeyError, RuntimeError, ModelError) as error:
            raise _unreadable(
                self.folder, f"the codes of {name} are missing or damaged: {error}"
            ) from error
        if not same:
            raise _unreadable(
                self.folder, f"the codes of {name} do not match the weight in the checkpoint"
            )
        return quantised

    def _read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _unreadable(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: {what}",
        fix="restore it from a copy of the bundle, or prune again with --overwrite",
    )
