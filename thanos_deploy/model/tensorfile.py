"""Read and write the tensors of safetensors files one by one.

Tensors are copied into memory of their own and files are not memory-mapped, because the pages of a
mapped file count as memory of the process for as long as they are mapped.

Source: the description of the format: 8 bytes little-endian header length, a JSON header padded
with spaces to a multiple of 8 bytes, then the tensors without gaps.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import ModelError
from thanos_deploy.model import download

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Dtype and shape of a tensor.
Kind = tuple[torch.dtype, tuple[int, ...]]

# File of a checkpoint in several files that maps each tensor to its file.
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry of a tensor in the header of a file.

    Attributes:
        name: name of the tensor.
        dtype: dtype as the format spells it, such as "BF16"; not always a key of `DTYPES`.
        shape: shape of the tensor.
        begin, end: position of its data, in bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def entries(path: Path) -> dict[str, Entry]:
    """Return the entries of an untrusted file by name, after a check of its format.

    Raises:
        ModelError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        found = _read_head(path)
    except (SafetensorError, OSError) as error:
        if path.is_file() and download.is_pointer(path):
            raise ModelError(
                f"{path}: is a pointer of Git LFS, not the weights", fix=download.FIX
            ) from error
        raise ModelError(
            f"{path}: not a readable safetensors file ({error})",
            fix="the file is missing, truncated or corrupt; fetch it again and compare its hash",
        ) from error
    return {name: found[name] for name in names}


def _read_head(path: Path) -> dict[str, Entry]:
    """Return the entries of a valid file by name."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Entry(name, entry["dtype"], tuple(entry["shape"]), begin, end)
    return found


def head(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Make the header of a file.

    Args:
        tensors: name, dtype (a key of `DTYPES`) and shape of each tensor, in the order of the file.

    Returns:
        the bytes before the first tensor, and a mapping from the name of each tensor to the
        position of its data, in bytes from the start of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name, dtype, shape in tensors:
        begins[name] = offset
        offset += math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[name], offset]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = struct.pack("<Q", len(encoded)) + encoded
    return data, {name: len(data) + begin for name, begin in begins.items()}


def bytes_of(kinds: Mapping[str, Kind]) -> int:
    """Return the total size of tensors with these dtypes and shapes, in bytes."""
    return sum(math.prod(shape) * kind.itemsize for kind, shape in kinds.values())


class TensorFile:
    """A safetensors file whose tensors are written and read whole or in pieces, in any order.

    All sizes are known when the file is created, so each tensor is written to its final place.

    Attributes:
        path: path of the file.
        kinds: maps the name of each tensor to its dtype and shape.
    """

    def __init__(
        self, path: Path, kinds: dict[str, Kind], begins: dict[str, int], descriptor: int
    ) -> None:
        self.path, self.kinds = path, kinds
        self._begins, self._descriptor = begins, descriptor

    @classmethod
    def create(cls, path: Path, kinds: Mapping[str, Kind]) -> "TensorFile":
        """Create a file and write its header; an existing file is overwritten."""
        data, begins = head((name, NAMES[kind], shape) for name, (kind, shape) in kinds.items())
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        created = cls(path, dict(kinds), begins, descriptor)
        created._write_at(data, 0)
        return created

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Open a file that is known to be valid for reading.

        Tensors of a dtype that is not in `DTYPES` are left out.
        """
        found = {name: one for name, one in _read_head(path).items() if one.dtype in DTYPES}
        kinds = {name: (DTYPES[one.dtype], one.shape) for name, one in found.items()}
        begins = {name: one.begin for name, one in found.items()}
        return cls(path, kinds, begins, os.open(path, os.O_RDONLY))

    @property
    def size(self) -> int:
        """Total size of the tensors, in bytes."""
        return bytes_of(self.kinds)

    def fill(self) -> None:
        """Extend a created file to its final size; tensors not yet written read as zeros."""
        os.ftruncate(self._descriptor, min(self._begins.values()) + self.size)

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor, or a piece of it that begins at the entry with index `start`.

        The dtype must be that of the tensor in `kinds`.
        """
        dtype, shape = self.kinds[name]
        assert tensor.dtype == dtype, f"{name}: {tensor.dtype} instead of {dtype}"
        assert start + tensor.numel() <= math.prod(shape), f"{name}: more than {shape}"
        self._write_at(
            _bytes_of(tensor.detach().cpu()), self._begins[name] + start * dtype.itemsize
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read a tensor, or its entries from `start` up to but not including `stop`.

        Returns:
            [entries], flat, on the CPU.

        Raises:
            OSError: the file ends before the last of these entries.
        """
        dtype, shape = self.kinds[name]
        tensor = torch.empty((math.prod(shape) if stop is None else stop) - start, dtype=dtype)
        view, offset = _bytes_of(tensor), self._begins[name] + start * dtype.itemsize
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if not count:
                raise OSError(
                    errno.EIO,
                    f"ends before the data of {name}",
                    str(self.path),
                )
            view, offset = view[count:], offset + count
        return tensor

    def sync(self) -> None:
        """Wait until all data is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def reopen(self) -> None:
        """Open the file again after `close`, to continue writing it."""
        self._descriptor = os.open(self.path, os.O_RDWR)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:  # it does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
