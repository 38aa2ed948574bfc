"""Weights that keep n of every m, stored as what is kept and where: smaller files, exactly undone.

A packed folder holds the model's own configuration and tokenizer, `packed.json`, and for every
`NAME.safetensors` of the model a `NAME.packed.safetensors`, in which a packed weight W [rows, cols]
with n of every m kept is two tensors:

    W.values  [rows, cols * n / m], in W's own dtype: of every m columns the n kept entries
    W.mask    uint8[rows, ceil(cols / 8)]: bit c % 8 (1 is the lowest) of byte c // 8 is set where
              column c is kept; exactly n bits in every group of m

2:4 in float16 takes 9/16 of the dense size, in int8 5/8. Kept entries may be zero, where a group
has more than m - n zeros. All other tensors are stored as they are. A weight that is stored
[inputs, outputs] (GPT-2) is packed transposed, so that groups always run along the rows.
`packed.json` names the packed weights, their pattern, and the SHA-256 of every file and of itself.

The files are not called `model.safetensors`, because loaders that do not know the layout would take
the missing weights for new ones and fill them with random numbers.

Also read: the checkpoints of format `sparse-24-bitmask` that compressed-tensors wrote before it
dropped the format, which has the same two tensors (`compressed`, `bitmask`) and the shape.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thanos_deploy import artifact, names, weights
from thanos_deploy.errors import IntegrityError, ModelError
from thanos_deploy.pattern import SemiStructured, parse
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.tensorfile import DTYPES, INDEX, NAMES, head

FORMAT = 1
RECORD = "packed.json"

_SUFFIX = ".packed.safetensors"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Entries that are looked at at once: choosing what is kept needs some 30 bytes for each.
_ENTRIES_AT_ONCE = 1 << 22

# What the libraries behind torch's semi-structured tensors take: dtype -> multiples of rows and of
# columns. For CUTLASS torch also lists float32, with half of every two kept, which is not 2:4.
SEMI_STRUCTURED_MULTIPLES = {
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)},
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (32, 32)},
}


def pack(weight: Tensor, pattern: SemiStructured, name: str = "weight") -> tuple[Tensor, Tensor]:
    """What is kept of a weight, and where, on the device of the weight.

    Args:
        weight: [rows, cols] of any dtype of at most 8 bytes; groups run along the rows.
        pattern: what the weight holds. A zero is an entry whose bits are all 0, so -0.0 is kept.
        name: for the message.

    Returns:
        values [rows, cols * kept / group] and mask uint8[rows, ceil(cols / 8)].

    Raises:
        ModelError: the weight does not hold the pattern.
    """
    require_pattern(weight, pattern, name)
    parts = [_packed_part(part, pattern) for part in _parts(weight)]
    return torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts])


def require_pattern(weight: Tensor, pattern: SemiStructured, name: str = "weight") -> None:
    """Refuse a weight that does not hold the pattern. The host reads one number from the device.

    Raises:
        ModelError: it does not; the message has the first group that is too full.
    """
    cols = weight.shape[1]
    kept, group = pattern.kept, pattern.group
    if cols % group:
        raise ModelError(
            f"{name}: {cols} columns are no multiple of {group}, so it does not hold {pattern}",
            fix="pack a model that was pruned to the pattern",
        )
    over = [_present(part, group).sum(dim=1, dtype=torch.int32) > kept for part in _parts(weight)]
    number = int(torch.stack([part.sum() for part in over]).sum()) if over else 0
    if number:
        row, first = divmod(int(torch.cat(over).to(torch.uint8).argmax()) * group, cols)
        raise ModelError(
            f"{name}: {number} groups of {group} have more than {kept} entries that are not 0, "
            f"the first in row {row} from column {first} on, so it does not hold {pattern}",
            fix="pack a model that was pruned to the pattern",
        )


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time."""
    parts: tuple[Tensor, ...] = weight.split(max(1, _ENTRIES_AT_ONCE // max(weight.shape[1], 1)))
    return parts


def _present(part: Tensor, group: int) -> Tensor:
    """Which entries are not zero, bool[groups, group]."""
    return (part.contiguous().view(_BITS[part.element_size()]) != 0).reshape(-1, group)


def _packed_part(part: Tensor, pattern: SemiStructured) -> tuple[Tensor, Tensor]:
    """What is kept of some rows that hold the pattern, and the bits that say where."""
    rows, cols = part.shape
    kept, group = pattern.kept, pattern.group
    present = _present(part, group)
    # Those that are present, and zeros to fill up, from the first column on.
    free = kept - present.sum(dim=1, keepdim=True, dtype=torch.int32)
    keep = present | (present.logical_not().cumsum(dim=1, dtype=torch.int32) <= free)
    # Every entry has a place: the kept ones in their order, the others all behind them.
    place = torch.where(keep, keep.cumsum(dim=1, dtype=torch.int32) - 1, kept).long()
    entries = part.reshape(-1, group)
    values = entries.new_empty(len(entries), kept + 1).scatter_(1, place, entries)[:, :kept]
    return values.reshape(rows, -1), _bits(keep.reshape(rows, cols))


def _bits(keep: Tensor) -> Tensor:
    """bool[rows, cols] as bits, uint8[rows, ceil(cols / 8)], the first column the lowest."""
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8))
    # Of 8 bytes that are 0 or 1, byte i has to become bit 56 + i: shifted by 56 - 7 i. No two of
    # the 64 products meet in one bit, so nothing is carried.
    return ((keep.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(values: Tensor, mask: Tensor, cols: int, name: str = "weight") -> Tensor:
    """The weight [rows, cols] that `pack` took apart, bit by bit the same.

    Raises:
        ModelError: the mask does not fit the values.
    """
    if (
        values.dim() != 2
        or mask.dtype != torch.uint8
        or tuple(mask.shape) != (len(values), math.ceil(cols / 8))
    ):
        raise ModelError(
            f"{name}: values {list(values.shape)} and {mask.dtype} mask {list(mask.shape)} do not "
            f"make {cols} columns",
            fix="the checkpoint is damaged; fetch it again",
        )
    weight = values.new_zeros(len(values), cols)
    step = max(1, _ENTRIES_AT_ONCE // max(cols, 1))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        bits = np.unpackbits(mask[rows].numpy(), axis=1, bitorder="little")
        where = torch.from_numpy(bits[:, :cols]).bool()
        if not bool((where.sum(dim=1) == values.shape[1]).all()) or bits[:, cols:].any():
            raise ModelError(
                f"{name}: a row of the mask does not keep {values.shape[1]} of {cols} columns",
                fix="the checkpoint is damaged; fetch it again",
            )
        weight[rows][where] = values[rows].flatten()
    return weight


def require_semi_structured(weight: Tensor, library: str, name: str = "weight") -> None:
    """Refuse what torch's semi-structured tensors cannot hold.

    torch checks the shape with a message that names no layer, and takes a weight that is not 2:4
    without a word and loses what does not fit.

    Args:
        weight: [rows, cols].
        library: a key of `SEMI_STRUCTURED_MULTIPLES`.
        name: for the message.

    Raises:
        ModelError: the library does not take its dtype or shape, or it is not 2:4.
    """
    taken = SEMI_STRUCTURED_MULTIPLES[library]
    multiples = taken.get(weight.dtype)
    if multiples is None or any(
        size == 0 or size % multiple for size, multiple in zip(weight.shape, multiples, strict=True)
    ):
        raise ModelError(
            f"{name}: {library} takes no 2:4 weight of {weight.dtype} {list(weight.shape)}",
            fix="it takes "
            + "; ".join(
                f"{dtype} with multiples of {rows} x {cols}"
                for dtype, (rows, cols) in taken.items()
            ),
        )
    require_pattern(weight, SemiStructured(2, 4), name)


def to_cutlass(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """A 2:4 weight as torch's semi-structured tensors hold it for CUTLASS.

    Args:
        weight: float16, bfloat16 or int8 [rows, cols].
        name: for the message.

    Returns:
        values [rows, cols / 2] and the metadata in the order in which the kernels read it.

    Raises:
        ModelError: the weight is not 2:4, or the kernels do not take its dtype or shape.
    """
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
    )

    require_semi_structured(weight, "cutlass", name)
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return values, metadata


def from_cutlass(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight that `to_cutlass` took apart."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)
    return weight


@dataclass(frozen=True, slots=True)
class Sizes:
    """What packing a folder did.

    Attributes:
        packed: names of the weights that were packed.
        bytes_before, bytes_after: of all safetensors files, without what was dropped.
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
        patterns: name -> pattern of the weights to pack.
        files: name -> file name of the tensors that belong to the model; None for all that there
            are. The others are dropped.
        transposed: they are stored [inputs, outputs].
        on_progress: told of every file.

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
        entries = [
            packed
            for entry in file.entries.values()
            for packed in _packed_entries(entry, patterns.get(entry.name), transposed=transposed)
        ]
        _write(target, entries, _packed(file, patterns, transposed=transposed))
        after += target.stat().st_size
        on_progress(number, len(shards))
    record = {
        "format": FORMAT,
        "transposed": transposed,
        "weights": {name: str(pattern) for name, pattern in patterns.items()},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": artifact.sha256(path)}
            for path in sorted(destination.glob(f"*{_SUFFIX}"))
        },
    }
    artifact.write_json(destination / RECORD, {**record, "sha256": artifact.sha256_of(record)})
    return Sizes(tuple(patterns), before, after)


def is_packed(folder: Path) -> bool:
    """A folder that `unpack_folder` reads."""
    return (folder / RECORD).exists() or _is_bitmask(folder)


def unpack_folder(source: Path, destination: Path, *, on_progress: OnProgress = silent) -> None:
    """Write ordinary safetensors files, one tensor in memory at a time.

    Args:
        source: a folder that `is_packed`.
        destination: an existing folder.
        on_progress: told of every file.

    Raises:
        IntegrityError: a file is not the one that `packed.json` names.
        ModelError: a file is missing or not readable, or a weight does not fit together.
    """
    names.require_own(source, error=ModelError)
    record = _read_record(source) if (source / RECORD).exists() else None
    shards = (
        [source / name for name in weights.shards(source)]
        if record is None
        else [source / name for name in record["files"]]
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
        artifact.write_json(
            destination / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a safetensors file: its name, its dtype in the format's words, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class _File:
    """A safetensors file of which one tensor is in memory at a time.

    Attributes:
        entries: name -> entry.

    Raises:
        ModelError: the file is missing or not readable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a handle
            self.entries = {
                name: _Entry(name, view.get_dtype(), tuple(view.get_shape()))
                for name, view in views.items()
            }

    def keep(self, names: Iterable[str]) -> int:
        """Take other tensors for none of the file's; returns their bytes."""
        kept = set(names)
        dropped = [entry for entry in self.entries.values() if entry.name not in kept]
        self.entries = {name: entry for name, entry in self.entries.items() if name in kept}
        return sum(self.read(entry.name).nbytes for entry in dropped)

    def read(self, name: str) -> Tensor:
        """A tensor by its name."""
        # Opened anew each time, and copied, because pages count as resident while they are mapped.
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor

    def _open(self) -> Any:  # safetensors ships no types for its handle
        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self._path}: not a readable safetensors file ({error})",
                fix="the file is missing, truncated or corrupt; fetch it again and compare its "
                "hash",
            ) from error


_Reader = tuple[_Entry, Callable[[], Tensor]]


def _packed_entries(
    entry: _Entry, pattern: SemiStructured | None, *, transposed: bool
) -> list[_Entry]:
    if pattern is None:
        return [entry]
    rows, cols = entry.shape[::-1] if transposed else entry.shape
    return [
        _Entry(f"{entry.name}.values", entry.dtype, (rows, cols * pattern.kept // pattern.group)),
        _Entry(f"{entry.name}.mask", "U8", (rows, math.ceil(cols / 8))),
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


def _packed_readers(file: _File, record: artifact.Json) -> list[_Reader]:
    """How to read every tensor of a file that `pack_folder` wrote."""
    transposed = record["transposed"]

    def reader(entry: _Entry) -> _Reader:
        weight = entry.name.removesuffix(".values")
        if weight == entry.name or weight not in record["weights"]:
            return entry, lambda: file.read(entry.name)
        if f"{weight}.mask" not in file.entries:
            raise _missing(f"{weight}.mask")
        pattern = parse(record["weights"][weight])
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

        return _Entry(weight, entry.dtype, (cols, rows) if transposed else (rows, cols)), read

    masks = {f"{weight}.mask" for weight in record["weights"]}
    return [reader(entry) for name, entry in file.entries.items() if name not in masks]


def _bitmask_readers(file: _File) -> list[_Reader]:
    """How to read every tensor of a file of compressed-tensors' format sparse-24-bitmask."""

    def reader(entry: _Entry) -> _Reader:
        stem = entry.name.removesuffix(".compressed")
        if stem == entry.name:
            return entry, lambda: file.read(entry.name)
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

        return _Entry(weight, entry.dtype, (rows, cols)), read

    return [
        reader(entry)
        for name, entry in file.entries.items()
        if not name.endswith((".bitmask", ".shape"))
    ]


def _missing(what: str) -> ModelError:
    return ModelError(
        f"a packed checkpoint without {what}", fix="the checkpoint is damaged; fetch it again"
    )


def _write(path: Path, entries: list[_Entry], tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file tensor by tensor."""
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"{path}: {entry.name} is stored as {entry.dtype}, which is not understood",
                fix="use the float checkpoint that this one was made from",
            )
    data, _ = head((entry.name, entry.dtype, entry.shape) for entry in entries)
    with path.open("wb") as out:
        out.write(data)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tuple(tensor.shape) == entry.shape, entry.name
            assert NAMES[tensor.dtype] == entry.dtype, entry.name
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _is_bitmask(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # whoever opens the folder says what is wrong with it
    if not isinstance(config, dict):
        return False
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        sparsity = settings.get("sparsity_config") if isinstance(settings, dict) else None
        if isinstance(sparsity, dict) and sparsity.get("format") == "sparse-24-bitmask":
            return True
    return False


def _read_record(folder: Path) -> artifact.Json:
    path = folder / RECORD
    try:
        record: artifact.Json = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise ModelError(
                f"{path}: packed format {record['format']!r}; this version reads format {FORMAT}",
                fix="use a newer version of thanos-deploy",
            )
        written = record.pop("sha256")
        if artifact.sha256_of(record) != written:
            raise IntegrityError(
                f"{path}: its content is not the one whose SHA-256 it states, {written}",
                fix="fetch the checkpoint again",
            )
        for pattern in record["weights"].values():
            parse(pattern)
        if type(record["transposed"]) is not bool or not record["files"]:
            raise ValueError("transposed is no truth value, or there are no files")
        files = {name: (file["bytes"], file["sha256"]) for name, file in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: not a readable record ({type(error).__name__}: {error})",
            fix="fetch the checkpoint again",
        ) from error
    for name, recorded in files.items():
        shard = folder / names.plain(name, path, suffix=_SUFFIX, error=ModelError)
        seen = (shard.stat().st_size, artifact.sha256(shard)) if shard.is_file() else None
        if seen != recorded:
            raise IntegrityError(
                f"{shard}: {'missing' if seen is None else f'{seen[0]} bytes, SHA-256 {seen[1]}'}; "
                f"{RECORD} says {recorded[0]} bytes, SHA-256 {recorded[1]}",
                fix="fetch the checkpoint again",
            )
    return record
