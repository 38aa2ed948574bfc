"""What a stage wrote into its hidden folder: flushed, hashed, and moved into the bundle."""

import shutil
from collections.abc import Collection
from pathlib import Path

from thanos_deploy.bundle.files import FileRecord, file_record, sync


def flushed(folder: Path) -> dict[str, FileRecord]:
    """The files below a folder by relative path, when they and their folders are on the disk."""
    records = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            records[path.relative_to(folder).as_posix()] = file_record(path)
    return records


def move(folder: Path, destination: Path, others: Collection[str]) -> None:
    """Move the entries of a folder into another, each in place of the entry of its name there.

    Args:
        folder: what a stage wrote.
        destination: the bundle.
        others: paths in the bundle of the files of other stages. In a folder that holds some of
            them, it is its entries that are moved, so that they stay.
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
