"""Checkpoints in which n:m weights are stored packed; `packing` packs a single weight."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.bundle import names
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.files import (
    FileRecord,
    Json,
    file_record,
    peek_json,
    sha256_of,
    write_json,
)
from thanos_deploy.errors import IntegrityError, ModelError
from thanos_deploy.model import weights
from thanos_deploy.model.packing import pack, unpack
from thanos_deploy.model.tensorfile import DTYPES, INDEX, NAMES, Entry, TensorFile, entries, head
from thanos_deploy.pattern import SemiStructured, parse
from thanos_deploy.progress import OnProgress, silent

FORMAT = 1
RECORD = "packed.json"

_SUFFIX = ".packed.safetensors"


@dataclass(frozen=True, slots=True)
class _Record:
    """The content of `packed.json`, without the SHA-256 of this content.

    Attributes:
        format: version of the format of the folder.
        transposed: whether the original weights are stored [inputs, outputs].
        weights: maps the name of a packed weight to its pattern.
        files: maps the name of a file with tensors to its size and hash.
    """

    format: int
    transposed: bool
    weights: Mapping[str, str]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The effect of packing a folder.

    Attributes:
        packed: names of the weights that were packed.
        bytes_before, bytes_after: size of all safetensors files before and after packing, in bytes,
            without dropped tensors.
    """

    packed: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def pack_folder(
    source: Path,
    destination: Path,
    patterns: Mapping[str, SemiStructured],
    *,
    files: Mapping[str, str] | None = None,
    transposed: bool = False,
    on_progress: OnProgress = silent,
) -> Sizes:
    """Pack the safetensors files of a model, one tensor in memory at a time.

    Args:
        source: a model folder.
        destination: an existing folder.
        patterns: maps the name of each weight to pack to its pattern.
        files: maps the name of each tensor that belongs to the model to the name of its file; None
            for all tensors. Other tensors are dropped.
        transposed: whether the weights are stored [inputs, outputs].
        on_progress: called after every file.

    Raises:
        ModelError: a weight does not hold its pattern, or a file is not readable.
    """
    shards = sorted(
        source.glob("*.safetensors")
        if files is None
        else {source / name for name in files.values()}
    )
    before = after = 0
    on_progress(0, len(shards))
    for number, shard in enumerate(shards, 1):
        target = destination / (shard.name.removesuffix(".safetensors") + _SUFFIX)
        file = _File(shard)
        before += shard.stat().st_size
        if files is not None:
            before -= file.keep(name for name in file.entries if files.get(name) == shard.name)
        outputs = [
            packed
            for entry in file.entries.values()
            for packed in _packed_outputs(entry, patterns.get(entry.name), transposed=transposed)
        ]
        _write(target, outputs, _packed(file, patterns, transposed=transposed))
        after += target.stat().st_size
        on_progress(number, len(shards))
    record = _Record(
        FORMAT,
        transposed,
        weights={name: str(pattern) for name, pattern in patterns.items()},
        files={path.name: file_record(path) for path in sorted(destination.glob(f"*{_SUFFIX}"))},
    )
    write_json(destination / RECORD, {**encode(record), "sha256": sha256_of(encode(record))})
    return Sizes(tuple(patterns), before, after)


def is_packed(folder: Path) -> bool:
    """Return whether `unpack_folder` can read a folder."""
    return (folder / RECORD).exists() or _is_bitmask(folder)


def patterns_of(folder: Path) -> dict[str, SemiStructured]:
    """Compare every file with its recorded hash, and return the pattern of each packed weight.

    Returns:
        maps the name of a packed weight to its pattern.

    Raises:
        IntegrityError: a file is not the one that `packed.json` names.
        ModelError: `packed.json` is missing or cannot be read.
    """
    weights = _read_record(folder).weights
    patterns = {name: parse(pattern) for name, pattern in weights.items()}
    return {name: its for name, its in patterns.items() if isinstance(its, SemiStructured)}


def unpack_folder(source: Path, destination: Path, *, on_progress: OnProgress = silent) -> None:
    """Write a packed folder as ordinary safetensors files, one tensor in memory at a time.

    Args:
        source: a folder for which `is_packed` is true.
        destination: an existing folder.
        on_progress: called after every file.

    Raises:
        IntegrityError: a file is not the one that `packed.json` names.
        ModelError: a file is missing or not readable, or the parts of a packed weight do not fit
            together.
    """
    names.require_own(source, error=ModelError)
    record = _read_record(source) if (source / RECORD).exists() else None
    shards = (
        [source / name for name in weights.shards(source)]
        if record is None
        else [source / name for name in record.files]
    )
    names.distinct((shard.name for shard in shards), source, error=ModelError)
    weight_map = {}
    on_progress(0, len(shards))
    for number, shard in enumerate(shards, 1):
        name = shard.name
        if record is not None:
            name = f"{name.removesuffix(_SUFFIX)}.safetensors"
        file = _File(shard)
        readers = _packed_readers(file, record) if record else _bitmask_readers(file)
        _write(destination / name, [entry for entry, _ in readers], (read() for _, read in readers))
        weight_map.update({entry.name: name for entry, _ in readers})
        on_progress(number, len(shards))
    if len(shards) > 1:
        total = sum((destination / name).stat().st_size for name in set(weight_map.values()))
        write_json(
            destination / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


class _File:
    """A safetensors file of which one tensor is in memory at a time.

    Attributes:
        entries: maps the name of a tensor to its entry.

    Raises:
        ModelError: the file is missing or not readable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries = entries(path)

    def keep(self, names: Iterable[str]) -> int:
        """Drop the entries of all tensors but the named ones; return the bytes of those dropped."""
        kept = set(names)
        dropped = [entry for entry in self.entries.values() if entry.name not in kept]
        self.entries = {name: entry for name, entry in self.entries.items() if name in kept}
        return sum(entry.end - entry.begin for entry in dropped)

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name.

        Raises:
            ModelError: its dtype is not in `DTYPES`.
        """
        _require_known(self._path, name, self.entries[name].dtype)
        with TensorFile.open(self._path) as file:
            return file.read(name).reshape(self.entries[name].shape)


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor to write: its name, its dtype as safetensors spells it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


_Reader = tuple[_Output, Callable[[], Tensor]]


def _packed_outputs(
    entry: Entry, pattern: SemiStructured | None, *, transposed: bool
) -> list[_Output]:
    if pattern is None:
        return [_Output(entry.name, entry.dtype, entry.shape)]
    rows, cols = entry.shape[::-1] if transposed else entry.shape
    return [
        _Output(f"{entry.name}.values", entry.dtype, (rows, cols * pattern.kept // pattern.group)),
        _Output(f"{entry.name}.mask", "U8", (rows, math.ceil(cols / 8))),
    ]


def _packed(
    file: _File, patterns: Mapping[str, SemiStructured], *, transposed: bool
) -> Iterator[Tensor]:
    for name in file.entries:
        tensor = file.read(name)
        if name in patterns:
            yield from pack(tensor.T if transposed else tensor, patterns[name], name)
        else:
            yield tensor


def _packed_readers(file: _File, record: _Record) -> list[_Reader]:
    """Return a reader for every tensor of a file that `pack_folder` wrote."""
    transposed = record.transposed

    def reader(entry: Entry) -> _Reader:
        weight = entry.name.removesuffix(".values")
        if weight == entry.name or weight not in record.weights:
            return _Output(entry.name, entry.dtype, entry.shape), lambda: file.read(entry.name)
        if f"{weight}.mask" not in file.entries:
            raise _missing(f"{weight}.mask")
        pattern = parse(record.weights[weight])
        if (
            not isinstance(pattern, SemiStructured)
            or len(entry.shape) != 2
            or entry.shape[1] % pattern.kept
        ):
            raise _missing(f"{weight} in groups of {pattern}")
        rows, kept = entry.shape
        cols = kept // pattern.kept * pattern.group

        def read() -> Tensor:
            dense = unpack(file.read(entry.name), file.read(f"{weight}.mask"), cols, weight)
            return dense.T if transposed else dense

        return _Output(weight, entry.dtype, (cols, rows) if transposed else (rows, cols)), read

    masks = {f"{weight}.mask" for weight in record.weights}
    return [reader(entry) for name, entry in file.entries.items() if name not in masks]


def _bitmask_readers(file: _File) -> list[_Reader]:
    """Return a reader for every tensor of a file in the format sparse-24-bitmask; see `packing`."""

    def reader(entry: Entry) -> _Reader:
        stem = entry.name.removesuffix(".compressed")
        if stem == entry.name:
            return _Output(entry.name, entry.dtype, entry.shape), lambda: file.read(entry.name)
        for part in (f"{stem}.bitmask", f"{stem}.shape"):
            if part not in file.entries:
                raise _missing(part)
        # Early versions kept ".weight" in the names of the three parts.
        weight = f"{stem.removesuffix('.weight')}.weight"
        shape = file.read(f"{stem}.shape").flatten().tolist()
        if len(shape) != 2 or min(shape) < 0 or math.prod(entry.shape) * 2 != math.prod(shape):
            raise _missing(f"{weight} of shape {shape}")
        rows, cols = shape

        def read() -> Tensor:
            values = file.read(entry.name).reshape(rows, cols // 2)
            return unpack(values, file.read(f"{stem}.bitmask"), cols, weight)

        return _Output(weight, entry.dtype, (rows, cols)), read

    return [
        reader(entry)
        for name, entry in file.entries.items()
        if not name.endswith((".bitmask", ".shape"))
    ]


def _missing(what: str) -> ModelError:
    return ModelError(
        f"a packed checkpoint without {what}", fix="the checkpoint is damaged; fetch it again"
    )


def _write(path: Path, outputs: list[_Output], tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file tensor by tensor."""
    for output in outputs:
        _require_known(path, output.name, output.dtype)
    data, _ = head((output.name, output.dtype, output.shape) for output in outputs)
    with path.open("wb") as out:
        out.write(data)
        for output, tensor in zip(outputs, tensors, strict=True):
            assert tuple(tensor.shape) == output.shape, output.name
            assert NAMES[tensor.dtype] == output.dtype, output.name
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _require_known(path: Path, name: str, dtype: str) -> None:
    """Refuse a dtype that cannot be read.

    Raises:
        ModelError: it is not in `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ModelError(
            f"{path}: {name} is stored as {dtype}, which cannot be read",
            fix="use the float checkpoint that this one was made from",
        )


def _is_bitmask(folder: Path) -> bool:
    config = peek_json(folder / "config.json")
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        sparsity = settings.get("sparsity_config") if isinstance(settings, dict) else None
        if isinstance(sparsity, dict) and sparsity.get("format") == "sparse-24-bitmask":
            return True
    return False


def _read_record(folder: Path) -> _Record:
    path = folder / RECORD
    try:
        content: Json = loads(path.read_bytes())
        if (found := content.get("format")) != FORMAT:
            raise ModelError(
                f"{path}: packed format {found!r}; this version reads format {FORMAT}",
                fix="use a newer version of thanos-deploy",
            )
        written = content.pop("sha256")
        if sha256_of(content) != written:
            raise IntegrityError(
                f"{path}: the content of the record does not have the SHA-256 that the "
                f"record states, {written}",
                fix="fetch the checkpoint again",
            )
        record = decode(_Record, content)
        for pattern in record.weights.values():
            parse(pattern)
        if not record.files:
            raise ValueError("there are no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: not a readable record ({type(error).__name__}: {error})",
            fix="fetch the checkpoint again",
        ) from error
    for name, recorded in record.files.items():
        shard = folder / names.plain(name, path, suffix=_SUFFIX, error=ModelError)
        seen = file_record(shard) if shard.is_file() else None
        if seen != recorded:
            raise IntegrityError(
                f"{shard}: {'missing' if seen is None else _said(seen)}; {RECORD} says "
                f"{_said(recorded)}",
                fix="fetch the checkpoint again",
            )
    return record


def _said(file: FileRecord) -> str:
    return f"{file.bytes} bytes, SHA-256 {file.sha256}"
