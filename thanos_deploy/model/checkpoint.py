"""Language models on disk: hub ids, Hugging Face folders and GGUF files.

A checkpoint is read tensor by tensor from its safetensors files and written back the same way, so
that pruning never needs the whole model in memory. No pickle is read or written, and no code that
comes with a model is run.
"""

import dataclasses
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from thanos_deploy.bundle import names
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import ModelError, boundary
from thanos_deploy.model import download, experts, pretrained
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.discovery import discover
from thanos_deploy.model.families import Family, family_of, row_of
from thanos_deploy.model.parameters import Parameters
from thanos_deploy.model.structure import BlockStructure, blocks_of, structures_of
from thanos_deploy.model.weights import Outline, Weights
from thanos_deploy.model.widths import Widths

# Higher numbers mean a damaged config.json. Each block or expert takes memory for a module before
# any other check could notice the damage.
_MOST_BLOCKS, _MOST_EXPERTS = 4096, 4096

# Longest sequence, in tokens, of a model whose configuration states none, such as one with ALiBi.
_WITHOUT_A_LIMIT = 32768

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A Hugging Face folder that can be pruned.

    Attributes:
        folder: the model folder.
        config: configuration of the model.
        family: names of its blocks and linear layers.
        weights: its parameters, as they are stored.
        widths: heads and channels of each block.
        blocks: the linear layers of each block.
    """

    folder: Path
    config: PretrainedConfig
    family: Family
    weights: Weights
    widths: tuple[Widths, ...]
    blocks: tuple[BlockStructure, ...]

    @property
    def parameters(self) -> int:
        """Total number of entries in all parameters; a tied parameter counts once."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    def bytes_in(self, dtype: str) -> int:
        """Return the size of the parameters in bytes.

        Args:
            dtype: a key of `DTYPES`; for any other name, each parameter counts in its own dtype.
        """
        return sum(
            math.prod(shape) * DTYPES.get(dtype, self.weights.dtypes[name]).itemsize
            for name, shape in self.weights.shapes.items()
        )

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the configuration and the headers of the weight files, but no weights.

        Raises:
            ModelError: a file is missing or unreadable, the model type has no family, the
                configuration does not describe a model, the row of the family does not describe
                this model, or the weights do not belong to it.
        """
        outline, parameters = cls.describe(folder)
        return dataclasses.replace(outline, weights=Weights(folder, parameters))

    @classmethod
    def outline(cls, folder: Path) -> "Checkpoint":
        """Read the configuration alone, which determines every shape and the dtype.

        Raises:
            ModelError: see `open`.
        """
        return cls.describe(folder)[0]

    @classmethod
    def describe(cls, folder: Path) -> tuple["Checkpoint", Parameters]:
        """Return the result of `outline`, and the names and shapes of the model's parameters."""
        config, family, widths = _configuration(folder)
        bare = cls(folder, config, family, Outline(folder, {}), widths, ())
        with boundary(
            ModelError,
            f"{folder / 'config.json'}: does not describe a valid model",
            fix="restore config.json from the model's origin",
        ):
            model = bare.skeleton()
        shapes = _shapes(model)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        own = {names[0]: shape for names, shape in shapes.items()}
        outline = Outline(folder, own, dtype)
        blocks = structures_of(model, family)
        ignored = tuple(sorted(model._keys_to_ignore_on_load_unexpected or ()))
        parameters = Parameters(shapes, family, ignored)
        if family.experts is not None:
            widths = tuple(
                block_widths.with_experts(config, family, bool(block.routed)) for block in blocks
            )
        described = dataclasses.replace(bare, weights=outline, widths=widths, blocks=blocks)
        return described, parameters

    @property
    def max_positions(self) -> int:
        """The longest sequence that the configuration allows, in tokens."""
        return int(getattr(self.config, self.family.positions, None) or _WITHOUT_A_LIMIT)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return block_widths.head_size(self.config)

    def skeleton(self, widths: Sequence[Widths] | None = None) -> PreTrainedModel:
        """Return the model without weights: parameters have no storage, buffers have values.

        Every expert is a module; see `experts.separate`.

        Args:
            widths: widths of the blocks; None for those of the checkpoint.

        Raises:
            ModelError: the blocks or their experts are not where the row of the family says.
        """
        widths = widths or self.widths
        config = deepcopy(self.config)  # changed below
        if self.family.experts is not None and widths != self.widths:
            entries = block_widths.describe(config, self.family, widths) or {}
            for name, number in entries.items():
                setattr(config, name, number)
        model = pretrained.make_skeleton(config)
        experts.separate(model, self.family)
        stock = block_widths.of_config(self.config, self.family)
        if self.family.experts is None and any(block != stock for block in widths):
            blocks = blocks_of(model, self.family)
            block_widths.resize(blocks, self.family, widths, self.head_size)
        model.eval()
        return model

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linear layers of all blocks, in the order of the forward pass."""
        return tuple(name for block in self.blocks for name in block.full_names)

    def entries_of_block(self, index: int) -> dict[str, int]:
        """Map the name of each parameter of a block, relative to it, to its number of entries."""
        prefix = f"{self.family.blocks}.{index}."
        return {
            name.removeprefix(prefix): math.prod(self.weights.shapes[stored])
            for name, stored in self.weights.stored.items()
            if name.startswith(prefix)
        }

    def linear(self, name: str) -> Tensor:
        """Read the weight of a linear layer, [outputs, inputs], in the dtype that it is stored in.

        Args:
            name: full name of the layer.

        Raises:
            ModelError: the weight has NaN or infinite entries, or the checkpoint is an `outline`.
            KeyError: the model has no such layer.
        """
        stored = self.stored_name(f"{name}.weight")
        weight = self.weights.read([stored])[stored]
        return weight.T if self.family.transposed else weight

    def stored_name(self, parameter: str) -> str:
        """Return the name under which `weights` has a parameter of the model."""
        return self.weights.stored[parameter]


def _shapes(model: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return `Parameters.shapes`: all names of each parameter -> its shape."""
    named = list(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    shapes = {id(parameter): tuple(parameter.shape) for _, parameter in named}
    return {tuple(same): shapes[key] for key, same in names.items()}


def _configuration(folder: Path) -> tuple[PretrainedConfig, Family, tuple[Widths, ...]]:
    """Read and check a folder's configuration; find its family and the widths of every block."""
    path = folder / "config.json"
    names.require_own(folder, error=ModelError)
    if not path.is_file():
        raise _no_model(folder)
    with boundary(
        ModelError,
        f"{path}: not a readable model configuration",
        fix="restore config.json from the model's origin",
    ):
        model_type = str(loads(path.read_bytes()).get("model_type"))
        if row_of(model_type) is None and model_type not in CONFIG_MAPPING:
            family_of(model_type)  # raises an error that lists the supported types
        config = pretrained.load_config(folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            family_of(model_type)
        count = config.num_hidden_layers
        if count > _MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers is {count:,}, more than {_MOST_BLOCKS:,}")
        family = row_of(model_type) or discover(config)
        if family.experts is not None and getattr(config, family.experts.count) > _MOST_EXPERTS:
            raise ValueError(f"{family.experts.count} is more than {_MOST_EXPERTS:,}")
    pretrained.require_generation_config(folder)
    declared = block_widths.declared(folder)
    if declared is not None and len(declared) != count:
        raise ModelError(
            f"{folder / block_widths.FILE}: {len(declared)} blocks are declared, and "
            f"config.json declares {count}",
            fix="use files that belong to the same checkpoint",
        )
    if declared is not None and family.experts is not None:
        raise ModelError(
            f"{folder / block_widths.FILE}: this file declares widths of blocks, but for a "
            "model type with experts config.json alone declares them",
            fix="restore the folder from the model's origin",
        )
    uniform = (block_widths.of_config(config, family),) * count
    return config, family, declared or uniform


def _no_model(folder: Path) -> ModelError:
    """Return the error for a folder without config.json."""
    if (folder / pretrained.ADAPTER).exists():
        return ModelError(
            f"{folder}: is an adapter, not a model: {pretrained.ADAPTER} is there, and no "
            "config.json",
            fix="merge it into its base model first, for example with peft: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)",
        )
    return ModelError(
        f"{folder / 'config.json'}: missing, so {folder} is not a model folder"
        + (interrupted := download.unfinished(folder)),
        fix=download.FIX
        if interrupted
        else "give a Hugging Face model folder, a hub id or a .gguf file",
    )
