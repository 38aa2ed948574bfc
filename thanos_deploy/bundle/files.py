"""Files of a bundle: their hashes, JSON written whole or not at all, and room on the disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from thanos_deploy.bundle.codec import Json as Json
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.errors import InputError, ResourceError

T = TypeVar("T")

# What begins like this was not finished, and is removed by the next writer.
PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Mapping[str, object]) -> str:
    """Hexadecimal SHA-256 of a JSON-ready value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, refusing NaN, which is no JSON."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def glanced(path: Path) -> Json:
    """The object in a JSON file of somebody else's, to see what kind of thing it describes.

    Empty where the file cannot be read or holds something else: whoever reads it in earnest says
    what is wrong with it.
    """
    try:
        content = loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_record(path: Path, cls: type[T]) -> T:
    """The record in a JSON file; see `codec.decode` for what its type may be.

    Raises:
        InputError: there is no such file, or it holds something else; the message says where.
    """
    return record_in(path, read_json(path), cls)


def record_in(path: Path, content: object, cls: type[T]) -> T:
    """The record that a JSON file was found to hold; see `read_record`."""
    try:
        return decode(cls, content)
    except ValueError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> object:
    """The value in a JSON file.

    Raises:
        InputError: there is no such file, or it is no JSON.
    """
    try:
        content: object = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return content


def write_record(path: Path, record: object) -> None:
    """Write a record so that `read_record` reads it."""
    write_json(
        path,
        [encode(one) for one in record] if isinstance(record, list | tuple) else encode(record),
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not readable ({error})",
        fix="restore the file from a copy of the bundle, or repeat the command that wrote it "
        "with --overwrite",
    )


def replace_json(path: Path, value: object) -> None:
    """Write a value as JSON so that the file has the old or the new one, whatever happens."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    write_json(partial, value)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(path.stat().st_size, sha256(path))


def size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def link(source: Path, destination: Path) -> None:
    """Give a file a second name; copy it where the file system cannot do that."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def require_disk(folder: Path, needed: int) -> None:
    """Refuse work that would fill the disk.

    Raises:
        ResourceError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {needed / 1e9:.1f} GB of disk space are needed, and "
            f"{free / 1e9:.1f} GB are free",
            fix="free some space, or give another folder with -o or $THANOS_DEPLOY_CACHE; "
            "finished work is kept, and repeating the command continues",
        )


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
