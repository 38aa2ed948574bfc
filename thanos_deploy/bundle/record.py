"""The records in the manifest of a bundle, and how the manifest is read."""

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
    """A kind of stage: its name in a manifest, and the types of its records.

    Attributes:
        name: name of the stage in the manifest.
        options: type of its options; see `codec` for the possible types.
        inputs: type of the record with the hashes of its inputs.
        result: type of its result.
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
        name: the hub id; for a local path, its last part; for a model in memory, the last part of
            the name that it was loaded from, or its class.
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
        inputs: hashes of what the stage read; when one of them changes, the stage is stale.
        files: size and hash of every file of the stage, by path relative to the bundle.
        result: the result of the stage.
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
        stage: name of its stage in the manifest.
        result: the result of the stage, a record of the target's own type.
        files: size and hash of each file, by path relative to the bundle.
        seconds: wall time.
    """

    stage: str
    result: Result
    files: Mapping[str, FileRecord]
    seconds: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    format: int
    source: Source
    stages: dict[str, StageRecord]


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in the folder of a bundle.

    Raises:
        InputError: there is no bundle, this version cannot read its format, or a file name or link
            in it leads out of its folder.
    """
    try:
        if os.path.lexists(path / MANIFEST):
            names.require_own(path)  # before any file is read through a link
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
    """Describe the differences between two sets of options, for a message."""
    return ", ".join(
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _require_plain(manifest: Path, source: Source, stages: Mapping[str, StageRecord]) -> None:
    """Refuse strings that are used as names of files or folders and are not safe as such.

    Raises:
        InputError: a stage or a file has such a name.
        ValueError: a string that has to be a SHA-256 hash is none.
    """
    files = {name: file for record in stages.values() for name, file in record.files.items()}
    for stage in stages:
        names.plain(stage, manifest)
    for name in files:
        names.plain(name, manifest, nested=True)
    names.distinct(files, manifest)
    # Hashes are checked too, because folders of the cache are named after them.
    hashes = [file.sha256 for file in files.values()] + [source.sha256] * bool(source.sha256)
    for sha256 in hashes:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 hash")
