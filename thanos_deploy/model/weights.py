"""Read the parameters of a model folder tensor by tensor.

Files may hold more than the parameters of a model: masks, positions and rotary frequencies that
older versions of transformers saved as buffers, and second copies of tied weights. Such tensors are
neither counted nor read nor written, as the loader of transformers makes them itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.bundle import names
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model import download
from thanos_deploy.model.fused import Part, parts_of
from thanos_deploy.model.parameters import Parameters
from thanos_deploy.model.tensorfile import DTYPES, INDEX, Entry, TensorFile, entries

SINGLE = "model.safetensors"

# Dtypes in which a weight may be stored.
_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}

# Entries in one piece of a tensor; see `Weights.pieces`.
_ENTRIES_AT_ONCE = 1 << 22


class Weights:
    """The parameters of a checkpoint folder, read by the names under which they are stored.

    Attributes:
        stored: maps the model's name of a parameter to the name under which it is stored.
        shapes: maps a stored name to the shape.
        dtypes: maps a stored name to the dtype as stored.
        files: maps a stored name to the file name of its shard.
        parts: maps the stored name of an expert's matrix or bias that is a part of a larger tensor
            to its place there; see `fused`. No tensor in the files has this name.

    Raises:
        ModelError: a file is missing or corrupt; a parameter is stored in another dtype than
            float64, float32, float16 or bfloat16, or twice with different values; or the stored
            tensors do not belong to the model, see `Parameters.require`.
    """

    def __init__(self, folder: Path, parameters: Parameters | None = None) -> None:
        """Read the headers of the files.

        Args:
            folder: the checkpoint.
            parameters: parameters of the model; None to accept every tensor in the files.
        """
        self.folder = folder
        found, files = self._entries()
        experts = None if parameters is None else parameters.family.experts
        self.parts: Mapping[str, Part] = {}
        if experts is not None and experts.fused:
            self.parts = parts_of(found, experts)
            found, files = _in_parts(found, files, self.parts)
        tensors = (
            {name: [name] for name in found} if parameters is None else parameters.stored(found)
        )
        if parameters is not None:
            self._refuse_quantised(found, files, parameters, tensors)
            parameters.require(folder, found, tensors)
        self.stored = {name: same[0] for name, same in tensors.items()}
        own = set(self.stored.values())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files: dict[str, str] = {}
        for name, entry in found.items():
            if name not in own:
                continue
            if entry.dtype not in _FLOATS:
                raise self._quantised(files[name], entry)
            self.shapes[name] = entry.shape
            self.dtypes[name] = _FLOATS[entry.dtype]
            self.files[name] = files[name]
        for first, *others in tensors.values():
            for other in others:
                if first not in self.parts:  # no part is tied
                    self._require_same(found[first], found[other], files)

    @property
    def tensors(self) -> dict[str, str]:
        """Maps the name of each tensor in the files to the file name of its shard."""
        return {self.stored_in(name): file for name, file in self.files.items()}

    def stored_in(self, name: str) -> str:
        """Return the name of the tensor in the files that a stored name is, or is a part of."""
        return self.parts[name].tensor if name in self.parts else name

    def _entries(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the entry and the file name of each tensor by name, in the order of the files."""
        found, files = {}, {}
        for shard in shards(self.folder):
            path = self.folder / shard
            if not path.exists():
                raise ModelError(
                    f"{path}: missing, though {INDEX} names it" + download.unfinished(self.folder),
                    fix=download.FIX,
                )
            stored = entries(path)
            found.update(stored)
            files.update(dict.fromkeys(stored, shard))
        return found, files

    def _refuse_quantised(
        self,
        found: Mapping[str, Entry],
        files: Mapping[str, str],
        parameters: Parameters,
        tensors: Mapping[str, list[str]],
    ) -> None:
        """Refuse integers in the place of a weight, such as `up_proj.qweight`.

        Raises:
            ModelError: a module lacks a parameter and has a tensor of another dtype instead.
        """
        base = f"{parameters.family.base}."
        missing = {
            name.removeprefix(base).rpartition(".")[0]
            for name, *_ in parameters.shapes
            if name not in tensors
        }
        for name, entry in found.items():
            module = name.removeprefix(base).rpartition(".")[0]
            if module in missing and entry.dtype not in _FLOATS:
                raise self._quantised(files[name], entry)

    def _quantised(self, file: str, entry: Entry) -> ModelError:
        return ModelError(
            f"{self.folder / file}: {entry.name} is stored as {entry.dtype}, a quantised or "
            "integer type",
            fix="use the float checkpoint that this one was made from",
        )

    def _require_same(self, one: Entry, two: Entry, files: Mapping[str, str]) -> None:
        """Refuse a parameter that is stored twice with different values.

        Raises:
            ModelError: dtypes, shapes or values differ.
        """
        same = (one.dtype, one.shape) == (two.dtype, two.shape)
        if same:
            with (
                TensorFile.open(self.folder / files[one.name]) as left,
                TensorFile.open(self.folder / files[two.name]) as right,
            ):
                same = all(
                    left.read(one.name, *ends)
                    .view(torch.uint8)
                    .equal(right.read(two.name, *ends).view(torch.uint8))
                    for ends in _bounds(one.shape)
                )
        if not same:
            raise ModelError(
                f"{self.folder}: {one.name} and {two.name} are one tied parameter "
                "according to config.json, but their values differ",
                fix="remove the one that the model does not use, or set tie_word_embeddings to "
                "false in config.json if it uses both",
            )

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """Read tensors by their stored names.

        Each piece goes to the device as soon as it is read, so the host holds one piece at a time.

        Args:
            names: stored names of the tensors.
            dtype: dtype of the result; None for the dtype in which each tensor is stored.
            device: device of the result.

        Returns:
            maps each name to its tensor.

        Raises:
            ModelError: a tensor has NaN or infinite entries.
        """
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(
                self.shapes[name], dtype=dtype or self.dtypes[name], device=device
            )
            flat = tensors[name].view(-1)
            for start, piece in self.pieces(name):
                flat[start : start + len(piece)] = piece.to(device)
        return tensors

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor in small pieces: the index of the first entry, and the entries.

        Raises:
            ModelError: the tensor has NaN or infinite entries; raised after the last piece.
        """
        entries, bad = math.prod(self.shapes[name]), 0
        path = self.folder / self.files[name]
        with TensorFile.open(path) as file:
            for start, piece in self._pieces(file, name):
                bad += int((~piece.isfinite()).sum())
                yield start, piece
        if bad:
            raise ModelError(
                f"{path}: {bad} of {entries} entries of {name} are NaN or infinite",
                fix="the checkpoint is damaged; fetch it again or use another one",
            )

    def _pieces(self, file: TensorFile, name: str) -> Iterator[tuple[int, Tensor]]:
        if name in self.parts:
            yield 0, self.parts[name].read(file).flatten()
            return
        for start, stop in _bounds(self.shapes[name]):
            yield start, file.read(name, start, stop)


def _in_parts(
    found: Mapping[str, Entry], files: Mapping[str, str], parts: Mapping[str, Part]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Replace each tensor that consists of parts by its parts, in entries and file names."""
    of_tensor: dict[str, list[str]] = {}
    for name, part in parts.items():
        of_tensor.setdefault(part.tensor, []).append(name)
    entries_, places = {}, {}
    for tensor, entry in found.items():
        for name in of_tensor.get(tensor, [tensor]):
            places[name] = files[tensor]
            if name in parts:
                shape = parts[name].shape(entry.shape)
                entries_[name] = Entry(name, entry.dtype, shape, entry.begin, entry.end)
            else:
                entries_[name] = entry
    return entries_, places


def _bounds(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of a tensor's pieces: first entry, and the one after the last entry."""
    entries = math.prod(shape)
    for start in range(0, entries, _ENTRIES_AT_ONCE):
        yield start, min(start + _ENTRIES_AT_ONCE, entries)


def shards(folder: Path) -> list[str]:
    """Return the file names of a checkpoint's safetensors files, all directly in its folder.

    Raises:
        ModelError: there are none, the index is not readable or has an invalid file name, or beside
            the index there is a file that loaders take for the whole model.
    """
    index = folder / INDEX
    if index.exists():
        try:
            found = sorted(set(loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index}: not a readable index ({error})", fix="fetch the checkpoint again"
            ) from error
        for name in found:
            names.plain(name, index, suffix=".safetensors", error=ModelError)
        names.distinct(found, index, error=ModelError)
        if (folder / SINGLE).exists() and found != [SINGLE]:
            raise ModelError(
                f"{folder}: two sets of weights: {SINGLE}, which transformers would load, and "
                f"{len(found)} files in {INDEX}, such as {found[0]}",
                fix=f"remove {SINGLE}, or {INDEX} and the files that it names",
            )
        return found
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise ModelError(
        f"{folder}: no {SINGLE} and no {INDEX}"
        + (f", only {', '.join(pickled)}, which may run code when loaded" if pickled else "")
        + (interrupted := download.unfinished(folder)),
        fix=download.FIX if interrupted else "use a checkpoint with safetensors weights",
    )


class Outline(Weights):
    """The names, shapes and dtype of a model's parameters from its configuration, without values.

    Every method that reads values raises a ModelError.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Describe parameters.

        Args:
            folder: folder of the configuration.
            shapes: maps the name of each parameter to its shape.
            dtype: dtype of all parameters.
        """
        self.folder = folder
        self.stored = {name: name for name in shapes}
        self.shapes = shapes
        self.dtypes = dict.fromkeys(shapes, dtype)
        self.files = {}
        self.parts = {}

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None = None, device: torch.device = CPU
    ) -> dict[str, Tensor]:
        """See `Weights.read`."""
        raise self._without_values()

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """See `Weights.pieces`."""
        raise self._without_values()

    def _without_values(self) -> ModelError:
        return ModelError(
            f"{self.folder}: only the configuration was read, so there are no values",
            fix="open the whole checkpoint, which needs its weights",
        )
