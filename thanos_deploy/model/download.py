"""What a download leaves behind that did not come to its end."""

from collections.abc import Iterator
from pathlib import Path

# What git writes in the place of a large file that it has not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"

# What downloaders add to the name of a file that is not complete.
_SUFFIXES = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download")

# Where the hub's own client keeps such files of a folder.
_HUB = ".cache/huggingface/download"

FIX = (
    "continue the download: `hf download NAME --local-dir FOLDER` fetches what is missing; in a "
    "clone `git lfs pull`"
)


def unfinished(folder: Path) -> str:
    """The rest of a sentence about a folder that lacks a file; empty if nothing was interrupted."""
    left = sorted(path.name for path in _left(folder))
    if not left:
        return ""
    return f"; its download was interrupted: {left[0]} is there" + (
        f", and {len(left) - 1} more" if len(left) > 1 else ""
    )


def is_pointer(path: Path) -> bool:
    """Whether a file only says where git is to fetch it from."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _left(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / _HUB):
        if place.is_dir():
            yield from (path for path in place.iterdir() if path.suffix in _SUFFIXES)
    # A snapshot in the hub's cache has links to these.
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and blobs.is_dir():
        yield from (path for path in blobs.iterdir() if path.suffix in _SUFFIXES)
