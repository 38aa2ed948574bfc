"""Checks of file names that are read from files: shards of an index, files of a manifest or graph.

The author of a checkpoint or a bundle chooses these names and the links beside them, so they are
not trusted. Two rules keep all reading and writing inside the folder:

    plain    a name is relative, has no part that leads elsewhere, and means the same on every
             system
    own      the entries of a folder are files, folders, and links to other entries of the folder

A folder in the hub's cache may also link to the blobs of its repository, which is the layout of
that cache: snapshots/REVISION/FILE -> ../../blobs/HASH. The path of the folder itself comes from
the user and may contain any links. Standard library only.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from thanos_deploy.errors import InputError

# Limits of the usual file systems: bytes of one part of a name, and of a whole name.
_PART, _WHOLE = 255, 1024

# Names that stand for devices on Windows, to which a folder may be copied.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def plain(
    name: object,
    source: Path | str,
    *,
    nested: bool = False,
    suffix: str = "",
    error: type[InputError] = InputError,
) -> str:
    """Return a name if it can only be the name of a file inside its folder; refuse any other.

    Args:
        name: the value that was read.
        source: the file that it was read from, for the message.
        nested: allow subfolders, separated by slashes.
        suffix: required end of the name.
        error: type of the error to raise.

    Raises:
        InputError: the value is not such a name.
    """
    problem = _problem(name, nested=nested, suffix=suffix)
    if problem:
        raise error(
            f"{source}: {_shown(name)} cannot be the name of one of its files: {problem}",
            fix="do not use this model or bundle unless you know who made it; fetch it again from "
            "its origin",
        )
    assert isinstance(name, str)
    return name


def distinct(
    names: Iterable[str], source: Path | str, *, error: type[InputError] = InputError
) -> None:
    """Refuse names that mean the same file on file systems that ignore case or accent encoding.

    Raises:
        InputError: two names differ only in this way.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if (other := seen.setdefault(key, name)) != name:
            raise error(
                f"{source}: {_shown(other)} and {_shown(name)} are names of files that "
                "differ only in capital letters or accents",
                fix="rename one of the two files, also in the file that refers to it",
            )


def require_own(folder: Path, *, error: type[InputError] = InputError) -> None:
    """Refuse a folder that contains a device, a broken link, or a link that leads out of it.

    Args:
        folder: an existing folder.
        error: type of the error to raise.

    Raises:
        InputError: there is such an entry; the message names it.
    """
    root = folder.resolve()
    homes = [root, *_blobs(root)]
    for path in _entries(root):
        if (problem := _foreign(path, homes)) is not None:
            raise error(
                f"{folder / path.relative_to(root)}: {problem}",
                fix="put the file itself there, or remove the entry if nothing needs it",
            )


def _problem(name: object, *, nested: bool, suffix: str) -> str:
    """Say what is wrong with a name; empty if nothing is."""
    if not isinstance(name, str) or not name:
        return "it is not a string"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    parts = name.split("/")
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "it has control characters"
    if "\\" in name or ":" in name:
        return "it has a backslash or a colon"
    if name.startswith("/"):
        return "it is an absolute path"
    if len(parts) > 1 and not nested:
        return "it names a folder"
    if any(part.startswith(".") for part in parts):
        return "a part of it begins with a dot"
    if any(not part or part != part.strip() or part.endswith(".") for part in parts):
        return "a part of it is empty, or ends with a space or a dot"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "it is the name of a device"
    if len(encoded) > _WHOLE or any(len(part.encode()) > _PART for part in parts):
        return "it is too long"
    if not name.endswith(suffix):
        return f"it does not end with {suffix}"
    return ""


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _blobs(root: Path) -> Iterator[Path]:
    """Yield the folder of blobs if a folder is, or lies in, a snapshot of the hub's cache."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            yield place.parent.parent / "blobs"
            return


def _entries(root: Path) -> Iterator[Path]:
    """Yield all entries of a folder and its subfolders, without following links."""
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            yield Path(place, name)


def _foreign(path: Path, homes: list[Path]) -> str | None:
    """Say what is wrong with an entry of a folder; None if nothing is."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                return f"a link out of its folder, to {os.readlink(path)}"
            mode = target.stat().st_mode
    except FileNotFoundError:
        # The entry is a broken link, or was removed after the folder was listed.
        return "a link to a file that is missing" if path.is_symlink() else None
    except (OSError, RuntimeError):  # RuntimeError: before Python 3.13
        return "a link that leads back to itself"
    usual = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return None if usual else "neither a file nor a folder"
