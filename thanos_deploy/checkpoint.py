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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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
from thanos_deploy.tensorfile import DTYPES as TENSOR_DTYPES
from thanos_deploy.tensorfile import INDEX, TensorFile
from thanos_deploy.widths import Widths

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SINGLE = "model.safetensors"
# What a weight may be stored in.
_FLOATS = {name: dtype for name, dtype in TENSOR_DTYPES.items() if dtype.is_floating_point}

# Entries of a piece.
_ENTRIES_AT_ONCE = 1 << 22

# Architectures that GGUF calls otherwise than transformers calls the model type.
_GGUF_NAMES = {"gptneox": "gpt_neox", "gemma3": "gemma3_text"}

# What belongs to a model besides its weights: configuration, tokenizer, chat template.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", f"{tokenizer_files.TEMPLATES}/*.jinja")


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
        folder = _download(model, revision, ["*.safetensors", *_COMPANIONS])
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
        if path.is_file() and not path.name.endswith(".index.json") and path.name[0] != "."
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
    path = destination / "config.json"
    try:
        config = json.loads(path.read_bytes())
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)  # it describes what has just been undone
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: not a readable model configuration ({error})",
            fix="restore config.json from the model's origin",
        ) from error
    artifact.write_json(path, config)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A Hugging Face folder that can be pruned.

    Attributes:
        folder: where it is.
        config: its configuration.
        family: how its blocks and linear layers are called.
        weights: its tensors.
        widths: heads and channels of each block.
    """

    folder: Path
    config: PretrainedConfig
    family: Family
    weights: "Weights"
    widths: tuple[Widths, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all of its tensors."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    def bytes_in(self, dtype: str) -> int:
        """Size of its tensors when stored in a dtype, a key of `DTYPES`; else in each one's own."""
        return sum(
            math.prod(shape) * DTYPES.get(dtype, self.weights.dtypes[name]).itemsize
            for name, shape in self.weights.shapes.items()
        )

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the configuration and the tensors' headers, and no weight.

        Raises:
            ModelError: a file is missing or unreadable, or the model type has no family.
        """
        config, family, widths = _configuration(folder)
        return cls(folder, config, family, Weights(folder), widths)

    @classmethod
    def outline(cls, folder: Path) -> "Checkpoint":
        """Read the configuration alone, from which every shape follows; no tensor can be read.

        Raises:
            ModelError: see `open`; or the configuration describes no model.
        """
        config, family, widths = _configuration(folder)
        bare = cls(folder, config, family, Outline({}), widths)
        try:
            parameters = bare.skeleton().named_parameters()
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ModelError(
                f"{folder / 'config.json'}: no model can be made of it ({error})",
                fix="restore config.json from the model's origin",
            ) from error
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        return dataclasses.replace(bare, weights=Outline(shapes))

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
            model = pretrained.make_model(self.config)
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
        """How the weights call a parameter; some checkpoints leave out the base model's prefix.

        Raises:
            ModelError: the weights do not have it.
        """
        for name in (parameter, parameter.removeprefix(f"{self.family.base}.")):
            if name in self.weights.shapes:
                return name
        raise ModelError(
            f"{self.folder}: the weights have no tensor {parameter}",
            fix="the checkpoint is incomplete or not of the type that its config.json names",
        )


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


class Weights:
    """The tensors of a checkpoint folder, read by name.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype as stored.
        files: name -> file name of its shard.

    Raises:
        ModelError: a file is missing or corrupt, or a tensor is stored in another dtype than
            float64, float32, float16 or bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files: dict[str, str] = {}
        for shard in shards(folder):
            with self._open(shard) as file:
                for name in file.keys():  # noqa: SIM118 - a file handle, not a mapping
                    view = file.get_slice(name)
                    if view.get_dtype() not in _FLOATS:
                        raise ModelError(
                            f"{folder / shard}: {name} is stored as {view.get_dtype()}, a "
                            "quantised or integer type",
                            fix="use the float checkpoint that this one was made from",
                        )
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _FLOATS[view.get_dtype()]
                    self.files[name] = shard

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """Tensors by name, in a dtype or, if None, in that in which each is stored.

        Pieces go to the device as they are read, so the host holds one at a time.

        Raises:
            ModelError: a tensor has NaN or infinite entries.
        """
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(
                self.shapes[name], dtype=dtype or self.dtypes[name], device=device
            )
            flat = tensors[name].view(-1)
            for start, piece in self.pieces(name):
                flat[start : start + len(piece)] = piece.to(device)
        return tensors

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces that take little memory: number of the first entry, entries.

        Raises:
            ModelError: the tensor has NaN or infinite entries.
        """
        entries, bad = math.prod(self.shapes[name]), 0
        path = self.folder / self.files[name]
        with TensorFile.open(path) as file:
            for start in range(0, entries, _ENTRIES_AT_ONCE):
                piece = file.read(name, start, min(start + _ENTRIES_AT_ONCE, entries))
                bad += int((~piece.isfinite()).sum())
                yield start, piece
        if bad:
            raise ModelError(
                f"{path}: {bad} of {entries} entries of {name} are NaN or infinite",
                fix="the checkpoint is damaged; fetch it again or use another one",
            )

    def _open(self, shard: str) -> Any:  # safetensors ships no types for its handle
        path = self.folder / shard
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise ModelError(
                f"{path}: missing, though {INDEX} names it", fix="fetch the checkpoint again"
            ) from error
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: not a readable safetensors file ({error})",
                fix="the file is truncated or corrupt; fetch it again and compare its hash",
            ) from error


def shards(folder: Path) -> list[str]:
    """The names of a checkpoint's safetensors files, each directly in its folder.

    Raises:
        ModelError: there are none, or the index is not readable or names what is none.
    """
    index = folder / INDEX
    if index.exists():
        try:
            found = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index}: not a readable index ({error})", fix="fetch the checkpoint again"
            ) from error
        for name in found:
            names.plain(name, index, suffix=".safetensors", error=ModelError)
        names.distinct(found, index, error=ModelError)
        return found
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise ModelError(
        f"{folder}: no {_SINGLE} and no {INDEX}"
        + (f", only {', '.join(pickled)}, which may run code when loaded" if pickled else ""),
        fix="use a checkpoint with safetensors weights",
    )


class Outline(Weights):
    """The names and shapes of a model's tensors, and no tensors."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.dtypes = {}
        self.files = {}


class WeightsCopy:
    """A copy of a checkpoint's safetensors files that is filled tensor by tensor, in any order.

    The files have the names, the tensors and the order of the original ones; only the dtype may
    differ.
    """

    def __init__(
        self,
        original: Weights,
        destination: Path,
        dtype: torch.dtype | None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Create the files.

        Args:
            original: the checkpoint to copy.
            destination: the folder to write to.
            dtype: what to store, or None to keep each tensor's own.
            shapes: name -> shape of the tensors that will have another shape.
        """
        shapes = {**original.shapes, **(shapes or {})}
        self._missing = dict.fromkeys(original.shapes)
        self._files: dict[str, TensorFile] = {}
        self.bytes = 0
        for shard in dict.fromkeys(original.files.values()):
            kinds = {
                name: (dtype or original.dtypes[name], shapes[name])
                for name, file in original.files.items()
                if file == shard
            }
            file = TensorFile.create(destination / shard, kinds)
            self._files.update(dict.fromkeys(kinds, file))
            self.bytes += file.size
        if (original.folder / INDEX).exists():
            index = {"metadata": {"total_size": self.bytes}, "weight_map": original.files}
            artifact.write_json(destination / INDEX, index)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that have not been written yet."""
        return list(self._missing)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written."""
        return self._files[name].kinds[name][0]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype `dtype(name)` and the shape it was given."""
        kind, expected = (tensor.dtype, tuple(tensor.shape)), self._files[name].kinds[name]
        assert kind == expected, f"{name}: {kind} instead of {expected}"
        self.write_pieces(name, [(0, tensor)])

    def write_pieces(self, name: str, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Write one tensor in pieces; see `Weights.pieces`."""
        del self._missing[name]
        for start, piece in pieces:
            self._files[name].write(name, piece, start)

    def __enter__(self) -> "WeightsCopy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in set(self._files.values()):
            file.close()
        assert error is not None or not self._missing, f"never written: {sorted(self._missing)}"


def copy_companions(original: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and chat template, and state the new dtype in config.json.

    Of the tokenizer the copy states what its files leave to the library that reads them.
    """
    for path in _companions(original):
        copy = destination / path.relative_to(original)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    pretrained.settle_tokenizer(destination)
    if dtype is not None:
        path = destination / "config.json"
        config = json.loads(path.read_bytes())
        config.pop("torch_dtype", None)  # the older name of the same entry
        config["dtype"] = str(dtype).removeprefix("torch.")
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
