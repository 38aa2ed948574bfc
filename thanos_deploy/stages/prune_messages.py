"""The messages of rank 0 to the other ranks when several ranks prune one model."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders to which rank 0 writes.

    Attributes:
        journals: folder of the journals.
        stage: hidden folder with the files of the stage, until the stage is finished.
    """

    journals: Path
    stage: Path


@dataclass(frozen=True, slots=True)
class Begun:
    """Where rank 0 has begun to prune; None if the stage was finished already."""

    folders: Folders | None


@dataclass(frozen=True, slots=True)
class Threads:
    """The number of threads that each rank has to use; None for as many as it has now."""

    count: int | None
