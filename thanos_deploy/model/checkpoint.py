"""Language models on disk: hub ids, Hugging Face folders and GGUF files.

A checkpoint is read tensor by tensor from its safetensors files and written back the same way, so
that pruning never needs the whole model in memory. No pickle is read or written, and no code that
comes with a model is run.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from thanos_deploy.bundle import names
from thanos_deploy.errors import DeployError, ModelError
from thanos_deploy.model import experts, pretrained
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.families import Family, family_of
from thanos_deploy.model.structure import BlockStructure, blocks_of, structures_of
from thanos_deploy.model.weights import Outline, Parameters, Weights
from thanos_deploy.model.widths import Widths

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A Hugging Face folder that can be pruned.

    Attributes:
        folder: where it is.
        config: its configuration.
        family: how its blocks and linear layers are called.
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
            ModelError: a file is missing or unreadable, the model type has no family, the
                configuration describes no model, or the row of the family does not describe that.
        """
        outline, names = cls._outline(folder)
        parameters = Parameters(names, outline.family)
        return dataclasses.replace(outline, weights=Weights(folder, parameters))

    @classmethod
    def outline(cls, folder: Path) -> "Checkpoint":
        """Read the configuration alone, from which every shape and the dtype follow.

        Raises:
            ModelError: see `open`.
        """
        return cls._outline(folder)[0]

    @classmethod
    def _outline(cls, folder: Path) -> tuple["Checkpoint", tuple[tuple[str, ...], ...]]:
        """The outline, and all names of each parameter; see `weights.Parameters`."""
        config, family, widths = _configuration(folder)
        bare = cls(folder, config, family, Outline(folder, {}), widths, ())
        try:
            model = bare.skeleton()
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ModelError(
                f"{folder / 'config.json'}: describes no valid model ({error})",
                fix="restore config.json from the model's origin",
            ) from error
        shapes = _shapes(model)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        own = {names[0]: shape for names, shape in shapes.items()}
        outline = Outline(folder, own, dtype)
        blocks = structures_of(model, family)
        return dataclasses.replace(bare, weights=outline, blocks=blocks), tuple(shapes)

    @property
    def max_positions(self) -> int:
        """The longest sequence that the configuration allows, in tokens."""
        return int(getattr(self.config, self.family.positions))

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return block_widths.head_size(self.config)

    def skeleton(self, widths: Sequence[Widths] | None = None) -> PreTrainedModel:
        """The model without its weights: parameters have no storage, buffers are real.

        Every expert is a module; see `experts.separate`.

        Args:
            widths: other ones than the checkpoint's own.

        Raises:
            ModelError: its blocks or their experts are not where the row of the family says.
        """
        widths = widths or self.widths
        with init_empty_weights(include_buffers=False):
            model = pretrained.make_model(deepcopy(self.config))  # which it writes to
        model.tie_weights()  # without storage every parameter has become one of its own
        experts.separate(model, self.family)
        stock = block_widths.of_config(self.config, self.family)
        if any(block != stock for block in widths):
            blocks = blocks_of(model, self.family)
            block_widths.resize(blocks, self.family, widths, self.head_size)
        model.eval()
        return model

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linear layers of all blocks, in the order of the forward pass."""
        return tuple(name for block in self.blocks for name in block.full_names)

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


def _shapes(model: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """All names of each parameter, the first being the one that it goes by -> its shape."""
    named = list(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    shapes = {id(parameter): tuple(parameter.shape) for _, parameter in named}
    return {tuple(same): shapes[key] for key, same in names.items()}


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
    if declared is not None and family.experts is not None:
        raise ModelError(
            f"{folder / block_widths.FILE}: widths of blocks, of a model type with experts, whose "
            "blocks cannot be cut",
            fix="restore the folder from the model's origin",
        )
    uniform = (block_widths.of_config(config, family),) * count
    return config, family, declared or uniform
