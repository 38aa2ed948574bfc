"""Language models on disk: hub ids, Hugging Face folders and GGUF files.

A checkpoint is read tensor by tensor from its safetensors files and written back the same way, so
that pruning never needs the whole model in memory. No pickle is read or written, and no code that
comes with a model is run.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from thanos_deploy import artifact, names, packing, pretrained, tokenizer_files
from thanos_deploy import widths as block_widths
from thanos_deploy.devices import CPU, memory_for
from thanos_deploy.errors import DeployError, ModelError, PlatformError
from thanos_deploy.families import Family, family_of
from thanos_deploy.tensorfile import INDEX
from thanos_deploy.weights import Outline, Parameters, Weights, shards
from thanos_deploy.widths import Widths

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Architectures that GGUF calls otherwise than transformers calls the model type.
_GGUF_NAMES = {"gptneox": "gpt_neox", "gemma3": "gemma3_text"}

# What belongs to a model besides its weights: configuration, tokenizer, chat template, licence. Not
# what a trainer, an adapter, an evaluation or another library's copy of the weights left there.
_COMPANIONS = (
    *("config.json", "generation_config.json", block_widths.FILE, packing.RECORD),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "*.jinja", f"{tokenizer_files.TEMPLATES}/*.jinja"),
    *("LICENSE*.txt", "NOTICE*.txt"),
)

# What config.json says of weights that are stored in other ways than those that are written here.
_STORAGE = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: "hub", "folder" or "gguf".
        name: what the user called it; for a local path, its last part.
        revision: commit of a hub model, else empty.
        sha256: hash over the weights, the configuration and the tokenizer.
        path: the local folder, or the GGUF file.
    """

    kind: str
    name: str
    revision: str
    sha256: str
    path: Path

    @property
    def is_ordinary(self) -> bool:
        """A Hugging Face folder as transformers loads it, neither GGUF nor packed."""
        return self.kind != "gguf" and not packing.is_packed(self.path)

    def to_json(self) -> artifact.Json:
        """The part that belongs in a manifest: all but the local path."""
        return {
            "kind": self.kind,
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
        }


def locate(model: str, *, revision: str | None = None) -> Source:
    """Find a model: a `.gguf` file, a local folder, or a hub id, downloaded unless it is cached.

    Raises:
        ModelError: there is no such model, or it has no safetensors weights.
        PlatformError: the hub cannot be reached and the model is not in its local cache.
    """
    path = _local(model)
    if path is None:
        folder = _download(model, revision, ["*.safetensors", INDEX, *_COMPANIONS])
        names.require_own(folder, error=ModelError)
        return Source("hub", model, folder.name, _hash_folder(folder), folder)
    if path.is_file():
        return Source("gguf", path.name, "", artifact.sha256(path), path)
    names.require_own(path, error=ModelError)
    return Source("folder", path.resolve().name, "", _hash_folder(path), path)


def locate_configuration(model: str, *, revision: str | None = None) -> Path | None:
    """The folder with a model's config.json; of a hub model nothing else is downloaded.

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
    """The file or folder that a user names; None if it can only be a hub id."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(
            f"{path}: a file that is not .gguf", fix="give a model folder, a hub id or a .gguf"
        )
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


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{repository}: neither a local path nor a model on the hub"
            + (f" with revision {revision}" if revision else ""),
            fix="check the spelling; for a private model log in with `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PlatformError(
            f"{repository}: no such local path, not in the hub's local cache, and the hub cannot "
            f"be reached ({type(error).__name__})",
            fix="check the path or the network, or give a local folder or .gguf file",
        ) from error


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    weights = (path for path in folder.glob("*.safetensors") if path.is_file())
    for path in sorted({*weights, *_companions(folder)}):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {artifact.sha256(path)}\n".encode())
    return digest.hexdigest()


def _companions(folder: Path) -> list[Path]:
    """The files of a model besides its weights; hidden ones are none of it."""
    found = sorted(
        path
        for pattern in _COMPANIONS
        for path in folder.glob(pattern)
        if path.is_file() and path.name[0] != "."
    )
    for path in found:
        names.plain(path.name, path.parent, error=ModelError)
    return found


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
        architecture = "" if field is None else str(field.contents())
        family_of(_GGUF_NAMES.get(architecture, architecture))
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
    packing.unpack_folder(folder, destination)
    copy_companions(folder, destination, None)
    (destination / packing.RECORD).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A Hugging Face folder that can be pruned.

    Attributes:
        folder: where it is.
        config: its configuration.
        family: how its blocks and linear layers are called.
        weights: its parameters, as they are stored.
        widths: heads and channels of each block.
    """

    folder: Path
    config: PretrainedConfig
    family: Family
    weights: Weights
    widths: tuple[Widths, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all of its parameters; a tied one counts once."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    def bytes_in(self, dtype: str) -> int:
        """Size of its parameters when stored in a dtype of `DTYPES`; else in each one's own."""
        return sum(
            math.prod(shape) * DTYPES.get(dtype, self.weights.dtypes[name]).itemsize
            for name, shape in self.weights.shapes.items()
        )

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the configuration and the tensors' headers, and no weight.

        Raises:
            ModelError: a file is missing or unreadable, the model type has no family, or the
                configuration describes no model.
        """
        bare = cls._bare(folder)
        parameters = Parameters(tuple(bare._named()), bare.family)
        return dataclasses.replace(bare, weights=Weights(folder, parameters))

    @classmethod
    def outline(cls, folder: Path) -> "Checkpoint":
        """Read the configuration alone, from which every shape follows; no tensor can be read.

        Raises:
            ModelError: see `open`.
        """
        bare = cls._bare(folder)
        shapes = {same[0]: shape for same, shape in bare._named().items()}
        return dataclasses.replace(bare, weights=Outline(shapes))

    @classmethod
    def _bare(cls, folder: Path) -> "Checkpoint":
        """Without weights."""
        config, family, widths = _configuration(folder)
        return cls(folder, config, family, Outline({}), widths)

    def _named(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """All names of each parameter, the first being the one that it goes by -> its shape.

        Raises:
            ModelError: the configuration describes no model.
        """
        try:
            named = list(self.skeleton().named_parameters(remove_duplicate=False))
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ModelError(
                f"{self.folder / 'config.json'}: no model can be made of it ({error})",
                fix="restore config.json from the model's origin",
            ) from error
        names: dict[int, list[str]] = {}
        for name, parameter in named:
            names.setdefault(id(parameter), []).append(name)
        shapes = {id(parameter): tuple(parameter.shape) for _, parameter in named}
        return {tuple(same): shapes[key] for key, same in names.items()}

    @property
    def max_positions(self) -> int:
        """The longest sequence that the configuration allows, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return block_widths.head_size(self.config)

    def skeleton(self, widths: Sequence[Widths] | None = None) -> PreTrainedModel:
        """The model without its weights: parameters have no storage, buffers are real.

        Args:
            widths: other ones than the checkpoint's own.
        """
        widths = widths or self.widths
        with init_empty_weights(include_buffers=False):
            model = pretrained.make_model(deepcopy(self.config))  # which it writes to
        model.tie_weights()  # without storage every parameter has become one of its own
        stock = block_widths.of_config(self.config, self.family)
        if any(block != stock for block in widths):
            blocks = model.get_submodule(self.family.blocks)
            assert isinstance(blocks, nn.ModuleList)
            block_widths.resize(blocks, self.family, widths, self.head_size)
        model.eval()
        return model

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linear layers of all blocks, in the order of the forward pass."""
        return tuple(
            f"{self.family.blocks}.{index}.{linear}"
            for index in range(self.config.num_hidden_layers)
            for linear in self.family.linears
        )

    def stored_name(self, parameter: str) -> str:
        """How the weights call a parameter; see `weights.Parameters`.

        Raises:
            ModelError: the weights do not have it.
        """
        if parameter not in self.weights.stored:
            raise ModelError(
                f"{self.folder}: the weights have no tensor {parameter}",
                fix="the checkpoint is incomplete or not of the type that its config.json names",
            )
        return self.weights.stored[parameter]


def _configuration(folder: Path) -> tuple[PretrainedConfig, Family, tuple[Widths, ...]]:
    """A folder's configuration, its family, and the widths of every block."""
    path = folder / "config.json"
    names.require_own(folder, error=ModelError)
    try:
        family = family_of(str(json.loads(path.read_bytes()).get("model_type")))
        config = pretrained.load_config(folder)
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: missing, so {folder} is not a model folder",
            fix="give a Hugging Face model folder, a hub id or a .gguf file",
        ) from error
    except (
        OSError,
        ValueError,
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        StrictDataclassError,
    ) as error:
        raise ModelError(
            f"{path}: not a readable model configuration ({error})",
            fix="restore config.json from the model's origin",
        ) from error
    count = config.num_hidden_layers
    declared = block_widths.declared(folder)
    if declared is not None and len(declared) != count:
        raise ModelError(
            f"{folder / block_widths.FILE}: {len(declared)} blocks, config.json says {count}",
            fix="use the files of one and the same checkpoint",
        )
    uniform = (block_widths.of_config(config, family),) * count
    return config, family, declared or uniform


def copy_companions(original: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and chat template.

    config.json then states the dtype, if it is a new one, and no way of storing the weights in
    fewer bits, as they are written in floats. Of the tokenizer the copy states what its files leave
    to the library that reads them.

    Raises:
        ModelError: config.json is missing or not readable.
    """
    for path in _companions(original):
        copy = destination / path.relative_to(original)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    pretrained.settle_tokenizer(destination)
    path = destination / "config.json"
    try:
        config = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{original / 'config.json'}: not a readable model configuration ({error})",
            fix="restore config.json from the model's origin",
        ) from error
    storage = [config.pop(key) for key in _STORAGE if key in config]
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name of the same entry
        config["dtype"] = str(dtype).removeprefix("torch.")
    if storage or dtype is not None:
        artifact.write_json(path, config)


def load_model(folder: Path, device: torch.device = CPU) -> PreTrainedModel:
    """The whole model in float32 on a device, ready for inference.

    By the stock loader, unless the folder declares widths that no stock configuration has.

    Raises:
        ModelError: the model does not load.
        ResourceError: it does not fit into the GPU's memory.
    """
    names.require_own(folder, error=ModelError)
    shards(folder)
    own = None
    if block_widths.declared(folder) is not None:
        own = _declared_class(Checkpoint.open(folder))
    model, missing = pretrained.load_model(folder, own)
    # The loader only warns about these, and makes the weights up.
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}",
            fix="the checkpoint is incomplete or not of the type that its config.json names",
        )
    with memory_for(f"{folder}, {model.num_parameters():,} parameters in float32"):
        loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter in place; buffers such as rotary frequencies stay as they are.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    for name, parameter in model.named_parameters():
        # Adding 0 turns the -0.0 that a small negative weight is rounded to into 0.0, which
        # kernels that look at bit patterns rely on.
        rounded = parameter.detach().to(dtype).add_(0.0)
        if not bool(rounded.isfinite().all()):
            raise ModelError(
                f"{name}: values up to {parameter.abs().max().item():g} do not fit {dtype}",
                fix="use float32",
            )
        parameter.data = rounded


def _declared_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The stock class of a checkpoint's models, with the widths that the checkpoint declares."""
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]

    def __init__(self: PreTrainedModel, config: PretrainedConfig) -> None:  # noqa: N807
        stock.__init__(self, config)
        blocks = self.get_submodule(checkpoint.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        family, size = checkpoint.family, checkpoint.head_size
        block_widths.resize(blocks, family, checkpoint.widths, size)

    # The loader renames stored weights for the library's own modules only.
    names = {"__init__": __init__, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), names)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: the folder has none that loads without the model's own code.
    """
    names.require_own(folder, error=ModelError)
    return pretrained.load_tokenizer(folder)
