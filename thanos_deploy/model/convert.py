"""GGUF files and packed folders, written as ordinary Hugging Face folders."""

from pathlib import Path

from thanos_deploy.errors import DeployError, ModelError, PlatformError
from thanos_deploy.model import packed_folder, pretrained
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.families import family_of_gguf


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Write a GGUF file as an ordinary Hugging Face folder, dequantised to float32.

    Raises:
        PlatformError: the `gguf` package is not installed.
        ModelError: the file is corrupt or of a model type without a family.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise PlatformError(
            f"{gguf}: reading GGUF needs the package gguf",
            fix="pip install 'thanos-deploy[gguf]'",
        ) from error

    try:
        field = GGUFReader(gguf).get_field("general.architecture")
        family_of_gguf("" if field is None else str(field.contents()))
        model, tokenizer = pretrained.load_gguf(gguf)
    except DeployError:
        raise
    # The readers index and reshape whatever the file says, so a corrupt one raises anything.
    except Exception as error:
        raise ModelError(
            f"{gguf}: not a readable GGUF file ({type(error).__name__}: {error})",
            fix="download the file again and compare its hash",
        ) from error
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def convert_packed(folder: Path, destination: Path) -> None:
    """Write a packed folder as an ordinary Hugging Face folder; see `packing`.

    Raises:
        IntegrityError: a file is not the one that was packed.
        ModelError: a file is missing or corrupt.
    """
    destination.mkdir()
    packed_folder.unpack_folder(folder, destination)
    copy_companions(folder, destination, None)
    (destination / packed_folder.RECORD).unlink(missing_ok=True)
