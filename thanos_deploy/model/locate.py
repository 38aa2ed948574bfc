"""Find the model that a user names: a hub id, a folder, a bundle, or a file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.bundle import files, layout, names
from thanos_deploy.bundle.record import Source
from thanos_deploy.errors import ModelError, PlatformError
from thanos_deploy.model import packed_folder
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.companions import COMPANIONS, LICENCES, companions
from thanos_deploy.model.mxfp4 import is_mxfp4
from thanos_deploy.model.tensorfile import INDEX
from thanos_deploy.model.text_part import wrapper_of
from thanos_deploy.model.weights import SINGLE, shards


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model on this machine.

    Attributes:
        source: where the model comes from.
        path: the local folder, or the GGUF file.
    """

    source: Source
    path: Path

    @property
    def is_ordinary(self) -> bool:
        """Whether the path is a language model's Hugging Face folder that needs no conversion."""
        return (
            self.source.kind != "gguf"
            and not packed_folder.is_packed(self.path)
            and wrapper_of(self.path) is None
            and not is_mxfp4(self.path)
        )


def locate(model: str, *, revision: str | None = None) -> LocatedModel:
    """Find a model: a file, a folder, a bundle, or a hub id, downloaded unless it is cached.

    A file is a `.gguf`, or a `.safetensors` beside its config.json. Whether the weights can be read
    is not checked here.

    Raises:
        ModelError: there is no such model, its index of weights is not readable, or its folder has
            a link that leads out of it.
        PlatformError: the hub cannot be reached and the model is not in its local cache, or this
            user has no access to the model.
    """
    path = _local(model)
    if path is None:
        folder = _fetch(model, revision)
        names.require_own(folder, error=ModelError)
        return LocatedModel(Source("hub", model, folder.name, hash_folder(folder)), folder)
    if path.is_file():
        return LocatedModel(Source("gguf", path.name, "", files.sha256(path)), path)
    names.require_own(path, error=ModelError)
    return LocatedModel(Source("folder", path.resolve().name, "", hash_folder(path)), path)


def locate_configuration(model: str, *, revision: str | None = None) -> Path | None:
    """Find the folder with a model's config.json, without downloading weights.

    Returns:
        None for a `.gguf` file, which has its own kind of configuration.

    Raises:
        ModelError, PlatformError: see `locate`.
    """
    path = _local(model)
    if path is None:
        return _download(model, revision, ["config.json", block_widths.FILE])
    return None if path.is_file() else path


def _local(model: str) -> Path | None:
    """Return the file or folder that a user names; None if it can only be a hub id."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return _folder_of(path)
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(
            f"{path}: this file is neither a .gguf nor a .safetensors file",
            fix="give a model folder, a hub id, a .gguf, or a .safetensors beside its config.json",
        )
    if (path / layout.MANIFEST).is_file() and (path / layout.MODEL).is_dir():
        return path / layout.MODEL  # of a bundle
    if path.exists():
        return path
    if (
        path.is_absolute()
        or path.suffix == ".gguf"
        or model.startswith((".", "~"))
        or model.count("/") > 1
    ):
        raise ModelError(f"{model}: no such file or folder", fix="check the path")
    return None


def _folder_of(weights: Path) -> Path:
    """Return the folder of a safetensors file.

    Raises:
        ModelError: the folder has no config.json, or its weights are in other files.
    """
    folder = weights.parent
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{weights}: there is no config.json beside this file, so the type of the "
            "model is unknown",
            fix="put the model's config.json and its tokenizer's files there",
        )
    if weights.name not in (found := shards(folder)):
        raise ModelError(
            f"{weights}: transformers loads the weights of {folder} from other files: "
            f"{', '.join(found)}",
            fix=f"give {folder}, or put this file into a folder of its own, as model.safetensors, "
            "beside its config.json",
        )
    return folder


def _fetch(repository: str, revision: str | None) -> Path:
    """Download the files that make up a model, and no other copy of its weights.

    Cached files are not downloaded again. If a connection breaks, the download of the file
    continues over a new one. After a killed process, the files that were complete are kept.

    Raises:
        ModelError, PlatformError: see `locate`.
    """
    folder = _download(repository, revision, [INDEX, *COMPANIONS, *LICENCES])
    if packed_folder.is_packed(folder):
        needed = ["*.safetensors"]
    else:
        needed = shards(folder) if (folder / INDEX).exists() else [SINGLE]
    # The same commit, even if another one was pushed meanwhile.
    folder = _download(repository, folder.name, needed)
    if missing := [name for name in needed if len(needed) > 1 and not (folder / name).exists()]:
        raise PlatformError(
            f"{repository}: {len(missing)} of {len(needed)} weight files, such as "
            f"{missing[0]}, are not in the hub's local cache",
            fix="repeat the command with a network and without --offline; files that are in "
            "the cache are kept",
        )
    return folder


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise PlatformError(
            f"{repository}: this model is gated, and the hub requires a token with access to it",
            fix=f"ask for access on https://huggingface.co/{repository}, and set HF_TOKEN to a "
            "token of that account, or log in with `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{repository}: neither a local path nor a model on the hub"
            + (f" with revision {revision}" if revision else ""),
            fix="check the spelling; for a private model set HF_TOKEN, or log in with "
            "`hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PlatformError(
            f"{repository}: no such local path, not in the hub's local cache, and the hub cannot "
            f"be reached ({type(error).__name__})",
            fix="check the path or the network, or give a local folder or .gguf file",
        ) from error


def hash_folder(folder: Path) -> str:
    """Return one SHA-256 over the weights, the configuration and the tokenizer in a folder."""
    digest = hashlib.sha256()
    weights = (path for path in folder.glob("*.safetensors") if path.is_file())
    for path in sorted({*weights, *companions(folder)}):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()
