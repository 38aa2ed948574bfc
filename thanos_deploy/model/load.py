"""Load a whole model and its tokenizer into memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from thanos_deploy.bundle import names
from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.model import experts, pretrained
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import row_of
from thanos_deploy.model.structure import blocks_of
from thanos_deploy.model.weights import shards


def load_model(folder: Path, device: torch.device = CPU) -> PreTrainedModel:
    """Load the whole model in float32 onto a device, ready for inference.

    The stock class of transformers loads the model. If the folder has a widths.json, a subclass
    with those widths does. Experts become separate modules; see `experts.separate`.

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
    # The library only warns about missing weights and gives them initial values.
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}",
            fix="use a complete checkpoint, of the model type that config.json names",
        )
    if (family := row_of(model.config.model_type)) is not None:
        experts.separate(model, family)
    with memory_for(f"{folder}, {model.num_parameters():,} parameters in float32"):
        loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def _declared_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """Make a subclass of the checkpoint's stock class that has the widths of the checkpoint."""
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]

    def __init__(self: PreTrainedModel, config: PretrainedConfig) -> None:  # noqa: N807
        stock.__init__(self, config)
        blocks = blocks_of(self, checkpoint.family)
        family, size = checkpoint.family, checkpoint.head_size
        block_widths.resize(blocks, family, checkpoint.widths, size)

    # The library renames stored weights only for classes of its own modules, by `__module__`.
    names = {"__init__": __init__, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), names)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ModelError: the folder has none that loads without the model's own code.
    """
    names.require_own(folder, error=ModelError)
    return pretrained.load_tokenizer(folder)
