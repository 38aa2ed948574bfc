"""What rank 0 tells the others when several of them prune one model."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Folders:
    """Where rank 0 prunes to.

    Attributes:
        journals: folder of the journals.
        stage: folder that becomes that of the stage.
    """

    journals: Path
    stage: Path


@dataclass(frozen=True, slots=True)
class Begun:
    """What rank 0 has begun; with None, nothing, as it was done before."""

    folders: Folders | None


@dataclass(frozen=True, slots=True)
class Threads:
    """With how many threads each rank is to go on; None for as many as it has."""

    count: int | None
