"""What the manifest of a bundle records, and how it is read."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from thanos_deploy.bundle import names
from thanos_deploy.bundle.codec import Json, decode, loads
from thanos_deploy.bundle.files import FileRecord
from thanos_deploy.bundle.layout import MANIFEST
from thanos_deploy.errors import InputError
from thanos_deploy.machine.environment import Environment

FORMAT = 1

_SHA256 = re.compile("[0-9a-f]{64}")

Options = TypeVar("Options")
Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Stage(Generic[Options, Inputs, Result]):
    """A kind of stage: what it is called in a manifest, and what is recorded of it.

    Attributes:
        name: in the manifest.
        options: the type of what it is made with; see `codec` for what a type may be.
        inputs: the type of the hashes of what it reads.
        result: the type of what it reports.
    """

    name: str
    options: type[Options]
    inputs: type[Inputs]
    result: type[Result]


@dataclass(frozen=True, slots=True)
class Nothing:
    """The options, inputs or result of a stage that has none."""


@dataclass(frozen=True, slots=True)
class Source:
    """The model that a bundle is made from.

    Attributes:
        kind: "hub", "folder", "gguf" or "memory".
        name: what the user called it; for a local path, its last part; for a model in memory, what
            it was loaded from.
        revision: commit of a hub model, else empty.
        sha256: hash over the weights, the configuration and the tokenizer.
    """

    kind: str
    name: str
    revision: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A finished stage as the manifest records it: its options, inputs, files and result.

    `options`, `inputs` and `result` of `bundle.manifest.Bundle` read these as typed records.

    Attributes:
        options: all options that a user can set.
        inputs: hashes of what the stage read; when one changes, the stage is stale.
        files: relative path -> record, for every file of the stage.
        result: what the stage reports.
        seconds: wall time.
        finished: UTC time, ISO 8601.
        environment: libraries and machine.
    """

    options: Json
    inputs: Json
    files: dict[str, FileRecord]
    result: Json
    seconds: float
    finished: str
    environment: Environment


@dataclass(frozen=True, slots=True)
class Exported(Generic[Result]):
    """A finished export.

    Attributes:
        stage: what the manifest calls it.
        result: what the target says of it; a record of the target's own.
        files: path in the bundle -> size and hash.
        seconds: wall time.
    """

    stage: str
    result: Result
    files: Mapping[str, FileRecord]
    seconds: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json holds."""

    format: int
    source: Source
    stages: dict[str, StageRecord]


def read_manifest(path: Path) -> Manifest:
    """The manifest in the folder of a bundle.

    Raises:
        InputError: there is no bundle, it is of a format that this version cannot read, or a
            name in it or a link leads out of its folder.
    """
    try:
        if os.path.lexists(path / MANIFEST):
            names.require_own(path)  # before anything is read
        content = loads((path / MANIFEST).read_bytes())
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise InputError(
                f"{path / MANIFEST}: bundle format {content['format']!r}; this version "
                f"reads format {FORMAT}",
                fix="use the version of thanos-deploy that the manifest names",
            )
        manifest = decode(Manifest, content)
        _require_plain(path / MANIFEST, manifest.source, manifest.stages)
        return manifest
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no {MANIFEST} there, so this is not a bundle",
            fix="give the output folder of `thanos-deploy prune` or `prune-export`",
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path / MANIFEST}: not a readable manifest ({type(error).__name__}: {error})",
            fix="restore the file from a copy of the bundle, or make the bundle again",
        ) from error


def differences(before: Json, now: Json) -> str:
    """The differences between two sets of options, as text for a message."""
    return ", ".join(
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _require_plain(manifest: Path, source: Source, stages: Mapping[str, StageRecord]) -> None:
    """Refuse what is used as the name of a file or folder and is none."""
    files = {name: file for record in stages.values() for name, file in record.files.items()}
    for stage in stages:
        names.plain(stage, manifest)
    for name in files:
        names.plain(name, manifest, nested=True)
    names.distinct(files, manifest)
    # Folders of the cache are called by the hash of what they were made from.
    hashes = [file.sha256 for file in files.values()] + [source.sha256] * bool(source.sha256)
    for sha256 in hashes:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 hash")
