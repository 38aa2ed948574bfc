"""What belongs to a model besides its weights, copied beside new weights."""

import shutil
from pathlib import Path

import torch

from thanos_deploy.bundle import files, names
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import ModelError
from thanos_deploy.model import packed_folder, pretrained, tokenizer_files
from thanos_deploy.model import widths as block_widths

# What belongs to a model besides its weights: configuration, tokenizer, chat template, licence. Not
# what a trainer, an adapter, an evaluation or another library's copy of the weights left there.
COMPANIONS = (
    *("config.json", "generation_config.json", block_widths.FILE, packed_folder.RECORD),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "*.jinja", f"{tokenizer_files.TEMPLATES}/*.jinja"),
    *("LICENSE*.txt", "NOTICE*.txt"),
)


def companions(folder: Path) -> list[Path]:
    """The files of a model besides its weights; hidden ones are none of it."""
    found = sorted(
        path
        for pattern in COMPANIONS
        for path in folder.glob(pattern)
        if path.is_file() and path.name[0] != "."
    )
    for path in found:
        names.plain(path.name, path.parent, error=ModelError)
    return found


def copy_companions(original: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and chat template.

    config.json then states the dtype, if it is a new one, and no way of storing the weights in
    fewer bits, as they are written in floats. Of the tokenizer the copy states what its files leave
    to the library that reads them.

    Raises:
        ModelError: config.json is missing or not readable.
    """
    for path in companions(original):
        copy = destination / path.relative_to(original)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    pretrained.settle_tokenizer(destination)
    path = destination / "config.json"
    try:
        config = dict(loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{original / 'config.json'}: not a readable model configuration ({error})",
            fix="restore config.json from the model's origin",
        ) from error
    storage = [config.pop(key) for key in pretrained.STORAGE if key in config]
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name of the same entry
        config["dtype"] = str(dtype).removeprefix("torch.")
    if storage or dtype is not None:
        files.write_json(path, config)
