"""Recognise what an interrupted download leaves behind."""

from collections.abc import Iterator
from pathlib import Path

# Beginning of the pointer file that git writes in the place of a large file that is not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"

# Suffixes that download programs add to the name of an incomplete file.
_SUFFIXES = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download")

# Subfolder in which the client of the hub keeps incomplete files of a folder.
_HUB = ".cache/huggingface/download"

FIX = (
    "continue the download: `hf download NAME --local-dir FOLDER` fetches what is missing; in a "
    "clone `git lfs pull`"
)


def unfinished(folder: Path) -> str:
    """Return the end of an error message about a folder that lacks a file.

    Returns:
        a clause that names an incomplete file; empty if no download was interrupted.
    """
    left = sorted(path.name for path in _left(folder))
    if not left:
        return ""
    return f"; its download was interrupted: {left[0]} is there" + (
        f", and {len(left) - 1} more" if len(left) > 1 else ""
    )


def is_pointer(path: Path) -> bool:
    """Return whether a file is a pointer of Git LFS instead of the content."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _left(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / _HUB):
        if place.is_dir():
            yield from (path for path in place.iterdir() if path.suffix in _SUFFIXES)
    # The files of a snapshot in the hub's cache are links to these blobs.
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and blobs.is_dir():
        yield from (path for path in blobs.iterdir() if path.suffix in _SUFFIXES)
