"""Write a copy of a checkpoint's files with other values, tensor by tensor."""

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

    Only one file is open at a time: large checkpoints have hundreds of files, and a process may not
    be allowed to open so many.

    The files have the names of the original files and hold the model's own tensors in the same
    order. All methods take the original names of the tensors, even if the copy renames them.

    Attributes:
        bytes: total size of the tensors in the copy, in bytes; 0 if nothing is written.
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
            destination: the folder to write to; None to write nothing, if another process writes.
            dtype: dtype of the copy; None to keep the dtype of each tensor.
            shapes: maps the name of each tensor that changes its shape to the new shape.
            gone: names of the tensors that the copy does not have.
            names: maps the name of a tensor in the original files to its name in the copy; None to
                keep all names.
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
        """Return the dtype in which a tensor is written."""
        return self._dtypes[name]

    @property
    def writes(self) -> bool:
        """Whether the copy has files; otherwise nothing may be written."""
        return bool(self._files)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype and the shape that the copy has for it."""
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
            if name in self._parts:  # a part comes as a single piece
                whole = piece.detach().cpu().reshape(self._shapes[name])
                self._parts[name].write(file, whole)
            else:
                file.write(self._called(name), piece, start)

    def _called(self, tensor: str) -> str:
        """Return the name in the copy of a tensor of the original files."""
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
