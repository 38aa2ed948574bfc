"""The folder of a journal: its owner, and checks that its files are as they were written."""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
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
    """A JSON entry and its SHA-256."""

    entry: Json
    sha256: str


def claim(folder: Path, owner: Json) -> None:
    """Make a folder the journal of an owner, and remove the content of any other owner.

    Args:
        folder: a folder for this journal alone.
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
        logger.warning(
            "%s: discarded, because it is of another run, so the work starts over: %s", folder, why
        )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    replace_json(path, owner)


def owner_of(folder: Path) -> Json:
    """Return the owner of a journal's folder; empty if there is no journal or it is unreadable."""
    try:
        owner = loads((folder / _OWNER).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def seal(path: Path, entry: Json) -> None:
    """Write an entry with its SHA-256, atomically."""
    replace_json(path, encode(_Content(entry, sha256_of(entry))))


def unsealed(path: Path) -> Json:
    """Read an entry that `seal` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an entry, or its SHA-256 does not match.
    """
    content = decode(_Content, loads(path.read_bytes()))
    if content.sha256 != sha256_of(content.entry):
        raise ValueError("the entry does not have the SHA-256 that was written with it")
    return content.entry


def found(path: Path, read: Callable[[Json], T]) -> T | None:
    """Read a record that `seal` wrote.

    Args:
        path: its file.
        read: makes the record of the sealed entry; a ValueError means that it is damaged.

    Returns:
        the record; None if it is missing, or damaged, which is logged.
    """
    try:
        return read(unsealed(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s: damaged, so what it records is done again: %s", path, error)
        return None


def intact(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether all files exist and have the recorded size and hash; a damaged file is logged.

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
    """Remove every file whose name is not in `kept`, except the record of the owner."""
    for path in folder.iterdir():
        if path.name != _OWNER and path.name not in kept:
            path.unlink()
