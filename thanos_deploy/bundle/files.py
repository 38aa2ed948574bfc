"""Files of a bundle: their hashes, JSON that is replaced atomically, and disk space."""

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

# Prefix of the names of unfinished files and folders, which the next writer removes.
PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Mapping[str, object]) -> str:
    """Return the hexadecimal SHA-256 of a JSON-ready value, independent of its key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def peek_json(path: Path) -> Json:
    """Return the JSON object in an untrusted file, to find out what kind of data it describes.

    Empty if the file is unreadable or contains something else. No error is raised here, because the
    code that reads the file later explains what is wrong.
    """
    try:
        content = loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_record(path: Path, cls: type[T]) -> T:
    """Read a record from a JSON file; see `codec.decode` for the possible types.

    Raises:
        InputError: the file is missing or contains something else; the message says where.
    """
    return record_in(path, read_json(path), cls)


def record_in(path: Path, content: object, cls: type[T]) -> T:
    """Decode a record from the content of a JSON file that was read before; see `read_record`."""
    try:
        return decode(cls, content)
    except ValueError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> object:
    """Read the value in a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        content: object = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return content


def write_record(path: Path, record: object) -> None:
    """Write a record, or a list of records, to a JSON file that `read_record` can read."""
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
    """Replace the value in a JSON file atomically: a crash leaves the old or the new content."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    write_json(partial, value)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def file_record(path: Path) -> FileRecord:
    """Return the size and the hash of a file."""
    return FileRecord(path.stat().st_size, sha256(path))


def size(folder: Path) -> int:
    """Return the total size of the files below a folder, in bytes; 0 if there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def link(source: Path, destination: Path) -> None:
    """Create a hard link to a file, or a copy if the file system cannot link."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def require_disk(folder: Path, needed: int) -> None:
    """Refuse work that would fill the disk.

    Raises:
        ResourceError: fewer than `needed` bytes are free on the disk of the folder.
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
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
