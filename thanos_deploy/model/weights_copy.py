"""A copy of a checkpoint's files with other values, written tensor by tensor."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from thanos_deploy.bundle import files
from thanos_deploy.model.fused import whole_shapes
from thanos_deploy.model.tensorfile import INDEX, TensorFile
from thanos_deploy.model.weights import Weights


class WeightsCopy:
    """A copy of a checkpoint's safetensors files that is filled tensor by tensor, in any order.

    One file is open at a time: large checkpoints have hundreds, and processes may open few.

    The files have the names of the original ones, and the model's own tensors in the same order.
    These are written by their original names, whatever the copy calls them.
    """

    def __init__(
        self,
        original: Weights,
        destination: Path | None,
        dtype: torch.dtype | None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        gone: Collection[str] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Create the files.

        Args:
            original: the checkpoint to copy.
            destination: the folder to write to; None to write nothing, where another process does.
            dtype: what to store, or None to keep each tensor's own.
            shapes: name -> shape of the tensors that will have another shape.
            gone: names of the tensors that the copy does not have.
            names: of a tensor in the files -> what the copy calls it; None to keep all names.
        """
        self._names = names or {}
        shapes = {**original.shapes, **(shapes or {})}
        self._dtypes = {name: dtype or own for name, own in original.dtypes.items()}
        self._shapes = {name: shapes[name] for name in original.shapes if name not in gone}
        self._parts = {
            name: replace(part, tensor=self._called(part.tensor))
            for name, part in original.parts.items()
        }
        self._missing = dict.fromkeys(self._shapes)
        self._files: dict[str, TensorFile] = {}
        self._open: TensorFile | None = None
        self.bytes = 0
        if destination is None:
            self._missing.clear()
            return
        fused = whole_shapes(
            (its, shapes[name]) for name, its in self._parts.items() if name in self._shapes
        )
        places: dict[str, str] = {}
        for shard in dict.fromkeys(original.files.values()):
            own = [name for name in self._shapes if original.files[name] == shard]
            stored = {name: self._called(original.stored_in(name)) for name in own}
            kinds = {
                stored[name]: (self._dtypes[name], fused.get(stored[name], shapes[name]))
                for name in own
            }
            if not kinds:
                continue
            file = TensorFile.create(destination / shard, kinds)
            if fused:
                file.fill()
            file.close()
            self._files.update(dict.fromkeys(own, file))
            places.update(dict.fromkeys(kinds, shard))
            self.bytes += file.size
        if (original.folder / INDEX).exists():
            index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
            files.write_json(destination / INDEX, index)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that have not been written yet."""
        return list(self._missing)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written."""
        return self._dtypes[name]

    @property
    def writes(self) -> bool:
        """There is a folder to write to; else nothing may be written."""
        return bool(self._files)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype `dtype(name)` and the shape it was given."""
        kind, expected = (tensor.dtype, tuple(tensor.shape)), (self.dtype(name), self._shapes[name])
        assert kind == expected, f"{name}: {kind} instead of {expected}"
        self.write_pieces(name, [(0, tensor)])

    def write_pieces(self, name: str, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Write one tensor in pieces; see `Weights.pieces`."""
        del self._missing[name]
        file = self._files[name]
        if file is not self._open:
            self._close()
            file.reopen()
            self._open = file
        for start, piece in pieces:
            if name in self._parts:  # which are read and written whole
                whole = piece.detach().cpu().reshape(self._shapes[name])
                self._parts[name].write(file, whole)
            else:
                file.write(self._called(name), piece, start)

    def _called(self, tensor: str) -> str:
        """What a tensor of the original files is called here."""
        return self._names.get(tensor, tensor)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> "WeightsCopy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        assert error is not None or not self._missing, f"never written: {sorted(self._missing)}"
