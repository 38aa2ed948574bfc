"""Flush and hash the files that a stage wrote to its hidden folder, and move them to the bundle."""

import shutil
from collections.abc import Collection
from pathlib import Path

from thanos_deploy.bundle.files import FileRecord, file_record, sync


def flushed(folder: Path) -> dict[str, FileRecord]:
    """Flush everything below a folder to the disk; return the records of its files by path."""
    records = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            records[path.relative_to(folder).as_posix()] = file_record(path)
    return records


def move(folder: Path, destination: Path, others: Collection[str]) -> None:
    """Move the entries of a folder to a bundle, where each replaces the entry of the same name.

    Args:
        folder: the folder with the files of a stage.
        destination: the folder of the bundle.
        others: paths of the files of other stages, relative to the bundle. A folder that contains
            any of them is not replaced as a whole: its entries are moved one by one.
    """
    for entry in sorted(folder.iterdir()):
        _move(entry, destination, Path(entry.name), others)


def _move(entry: Path, bundle: Path, name: Path, others: Collection[str]) -> None:
    if any(file.startswith(f"{name.as_posix()}/") for file in others):
        for part in sorted(entry.iterdir()):
            _move(part, bundle, name / part.name, others)
        return
    destination = bundle / name
    if destination.is_dir():
        shutil.rmtree(destination)
    destination.parent.mkdir(exist_ok=True)
    entry.replace(destination)
