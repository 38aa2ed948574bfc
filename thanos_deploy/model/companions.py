"""Find the files of a model besides its weights, and copy them beside new weights."""

import shutil
from pathlib import Path

import torch

from thanos_deploy.bundle import files, names
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import ModelError
from thanos_deploy.model import packed_folder, pretrained, tokenizer_files
from thanos_deploy.model import widths as block_widths

# Files of a model besides its weights: configuration, tokenizer, chat template, licence. Files of a
# trainer, an adapter, an evaluation or another library's copy of the weights are not among them.
COMPANIONS = (
    *("config.json", "generation_config.json", block_widths.FILE, packed_folder.RECORD),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "*.jinja", f"{tokenizer_files.TEMPLATES}/*.jinja"),
    *("LICENSE*.txt", "NOTICE*.txt"),
)

# Further names of licences, notices and policies of use. They go along with a model, but do not
# tell one model from another.
LICENCES = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md", "USE_POLICY.md", "USAGE_POLICY")


def companions(folder: Path) -> list[Path]:
    """Return the files of a model besides its weights and `LICENCES`, without hidden files.

    Raises:
        ModelError: a name is not a plain file name; see `bundle.names`.
    """
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
    """Copy the files of `companions` and the licences, and adapt them to new weights.

    The copied config.json states the new dtype. The new weights are floats, so entries about
    quantised storage are removed. Rules of the tokenizer that its files leave to the library are
    written out; see `pretrained.settle_tokenizer`.

    Args:
        original: the model folder to copy from.
        destination: an existing folder.
        dtype: dtype of the new weights; None if it does not change.

    Raises:
        ModelError: config.json is missing or not readable.
    """
    licences = [path for name in LICENCES if (path := original / name).is_file()]
    for path in companions(original) + licences:
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
