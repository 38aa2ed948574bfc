"""Write GGUF files, packed folders and models in memory as ordinary Hugging Face folders.

`text_part` writes the language model of a vision-language model.
"""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.errors import DeployError, ModelError, PlatformError, UsageError, summary
from thanos_deploy.model import gguf_head, packed_folder, pretrained
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.families import family_of_gguf


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Write a GGUF file as an ordinary Hugging Face folder, dequantised to float32.

    Raises:
        PlatformError: the `gguf` package is not installed.
        ModelError: the file is corrupt or of a model type without a family.
    """
    try:
        import gguf as _  # noqa: F401 - transformers reads with it
    except ImportError as error:
        raise PlatformError(
            f"{gguf}: reading GGUF needs the package gguf",
            fix="pip install 'thanos-deploy[gguf]'",
        ) from error

    try:
        # Check the header here first: the package's reader takes seconds for a vocabulary.
        family_of_gguf(gguf_head.architecture(gguf))
        model, tokenizer = pretrained.load_gguf(gguf)
    except DeployError:
        raise
    # The readers index and reshape whatever the file says, so a corrupt file can raise any
    # exception.
    except Exception as error:
        raise ModelError(
            f"{gguf}: not a readable GGUF file ({summary(error)})",
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


def convert_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, destination: Path
) -> None:
    """Write a transformers model that is in memory, in its own dtype, and its tokenizer.

    Raises:
        UsageError: the model or the tokenizer is of another type, or the model has adapters beside
            its weights.
    """
    for what, value, wanted in (
        ("model", model, PreTrainedModel),
        ("tokenizer", tokenizer, PreTrainedTokenizerBase),
    ):
        if not isinstance(value, wanted):
            raise UsageError(
                f"the {what} in memory is of type {type(value).__name__}",
                fix=f"give a {wanted.__name__} of transformers, or the folder of the model",
            )
    if getattr(model, "peft_config", None):
        raise UsageError(
            f"the {type(model).__name__} in memory has adapters, which would not be saved "
            "with its weights",
            fix="merge the adapters into the weights first",
        )
    with redirect_stderr(StringIO()):  # a progress bar
        model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
