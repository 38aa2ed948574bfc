"""Extract the language model of a vision-language model as a model of its own.

A vision-language model is an image encoder, a projection, and a language model whose blocks compute
the same as those of a known model type. On text alone its positions are also those of that type. So
the language model is written as a model of the known type, under the names that this type uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from thanos_deploy.bundle import files
from thanos_deploy.errors import ModelError, boundary
from thanos_deploy.model import pretrained
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.tensorfile import INDEX, TensorFile
from thanos_deploy.model.weights import Weights


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A type of vision-language model.

    Attributes:
        text: model type of the language model in it.
        ignored: regular expressions for the names of all other weights.
    """

    text: str
    ignored: tuple[str, ...]


_TOWERS = (r"^(model\.)?(vision_tower|multi_modal_projector)\.", r"^(model\.)?visual\.")

# Supported vision-language models, by model type. The models of Qwen have separate positions for
# height and width; for text these are all the same.
WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text", _TOWERS),
    "mistral3": Wrapper("mistral", _TOWERS),
    "qwen2_5_vl": Wrapper("qwen2", _TOWERS),
    "qwen3_vl": Wrapper("qwen3", _TOWERS),
}

# Prefixes of the language model in files of older and newer versions -> prefixes in a model of its
# own.
_RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
}

# Entries of `rope_parameters` to leave out: those for images, and `type`, the older name of
# `rope_type`.
_OF_IMAGES = ("mrope_section", "mrope_interleaved", "type")


def wrapper_of(folder: Path) -> Wrapper | None:
    """Return the type of vision-language model in a folder; None if it has another model."""
    return WRAPPERS.get(str(files.peek_json(folder / "config.json").get("model_type")))


def write_text_part(folder: Path, destination: Path) -> None:
    """Write the language model of a vision-language model as a folder of its own.

    Args:
        folder: a folder for which `wrapper_of` is not None.
        destination: the folder to create.

    Raises:
        ModelError: the folder is not readable, or its language model is not of the known type.
    """
    wrapper = wrapper_of(folder)
    assert wrapper is not None
    destination.mkdir()
    copy_companions(folder, destination, None)
    with boundary(
        ModelError,
        f"{folder / 'config.json'}: does not describe a language model of the type {wrapper.text}",
        fix="restore config.json from the model's origin",
    ):
        files.write_json(destination / "config.json", _configuration(folder, wrapper))
    described, parameters = Checkpoint.describe(destination)
    known = replace(
        parameters,
        family=replace(described.family, renamed={**described.family.renamed, **_RENAMED}),
        ignored=(*parameters.ignored, *wrapper.ignored),
    )
    weights = Weights(folder, known)
    own = {stored: name for name, stored in weights.stored.items()}
    for shard in dict.fromkeys(weights.files.values()):
        names = [name for name, file in weights.files.items() if file == shard]
        kinds = {own[name]: (weights.dtypes[name], weights.shapes[name]) for name in names}
        file = TensorFile.create(destination / shard, kinds)
        for name in names:
            for start, piece in weights.pieces(name):
                file.write(own[name], piece, start)
        file.close()
    if (folder / INDEX).exists():
        places = {own[name]: file for name, file in weights.files.items()}
        files.write_json(destination / INDEX, {"metadata": {}, "weight_map": places})


def _configuration(folder: Path, wrapper: Wrapper) -> dict[str, object]:
    """Return the config.json of the language model alone."""
    whole = pretrained.load_config(folder)
    inner = whole.get_text_config().to_dict()
    known = AutoConfig.for_model(wrapper.text).to_dict()
    entries = {name: value for name, value in inner.items() if name in known}
    entries["model_type"] = wrapper.text
    entries["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    if rope := entries.get("rope_parameters"):
        entries["rope_parameters"] = {
            name: "default" if value == "mrope" else value
            for name, value in dict(rope).items()
            if name not in _OF_IMAGES
        }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if entries.get(name) is None:
            entries[name] = getattr(whole, name, None)
    made = AutoConfig.for_model(**entries)
    entries = dict(made.to_dict())
    entries["architectures"] = None
    return entries
