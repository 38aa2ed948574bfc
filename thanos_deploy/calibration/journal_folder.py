"""A folder of a journal: whose it is, and which of its files are what was written."""

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from thanos_deploy.bundle import names, record
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.files import FileRecord, Json, file_record, replace_json, sha256_of

logger = logging.getLogger(__name__)

_OWNER = "journal.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Content:
    """The JSON of an entry, and its SHA-256."""

    entry: Json
    sha256: str


def claim(folder: Path, owner: Json) -> None:
    """Make a folder one of a journal; what is there for another owner is removed.

    Args:
        folder: for this journal alone.
        owner: everything that the results depend on.
    """
    path = folder / _OWNER
    if folder.exists():
        try:
            before = loads(path.read_bytes())
            if before == owner:
                return
            why = record.differences(before, owner)
        except (OSError, ValueError, AttributeError):
            why = f"{_OWNER} is missing or damaged"
        logger.warning("%s: discarded, so pruning starts over: %s", folder, why)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    replace_json(path, owner)


def owner_of(folder: Path) -> Json:
    """What the results of a journal depend on; nothing if there is no journal, or none to read."""
    try:
        owner = loads((folder / _OWNER).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def seal(path: Path, entry: Json) -> None:
    """Write an entry so that it counts as a whole or not at all."""
    replace_json(path, encode(_Content(entry, sha256_of(entry))))


def unsealed(path: Path) -> Json:
    """What `seal` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: that is not what it holds.
    """
    content = decode(_Content, loads(path.read_bytes()))
    if content.sha256 != sha256_of(content.entry):
        raise ValueError(f"SHA-256 {content.sha256}")
    return content.entry


def found(path: Path, cls: type[T]) -> T | None:
    """The record that `seal` wrote; None without one, or of one that is damaged, which is said."""
    try:
        return decode(cls, unsealed(path))
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning("%s: damaged", path)
        return None


def intact(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """The files are there and are what was written; one that is damaged is warned about.

    Raises:
        InputError: a name leads out of the folder.
    """
    for name, recorded in files.items():
        path = folder / names.plain(name, folder)
        if not path.exists():
            return False
        if (seen := file_record(path)) != recorded:
            logger.warning(
                "%s: damaged; the file has %d bytes, SHA-256 %s; %d bytes, SHA-256 %s were written",
                path,
                seen.bytes,
                seen.sha256,
                recorded.bytes,
                recorded.sha256,
            )
            return False
    return True


def drop_all_but(folder: Path, kept: Collection[str]) -> None:
    """Remove every file with another name, but that of the owner."""
    for path in folder.iterdir():
        if path.name != _OWNER and path.name not in kept:
            path.unlink()
