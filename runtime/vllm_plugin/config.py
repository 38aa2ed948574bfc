"""The quantisation method for vLLM: it knows which layers of a model have packed 2:4 weights.

vLLM makes a `TwoFourConfig` from the `quantization_config` of config.json, and asks it for the
method of every layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import LoRAConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from runtime.vllm_plugin.linear import TwoFourLinearMethod
from thanos_deploy.errors import UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.model import quantization


class TwoFourConfig(QuantizationConfig):
    """The `quantization_config` of a folder with packed layers.

    Attributes:
        layers: full names of the packed layers of the checkpoint, before vLLM fuses them. The names
            are those of config.json until vLLM calls `apply_vllm_mapper`.
    """

    def __init__(self, layers: frozenset[str]) -> None:
        super().__init__()
        self.layers = layers

    def get_name(self) -> str:
        """Return the name of the method in config.json."""
        return quantization.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that the kernels of this machine support."""
        on_cpu = [torch.float32] if current_platform.is_cpu() else []
        return [torch.bfloat16, torch.float16, *on_cpu]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability as vLLM writes it: 80 for 8.0."""
        major, minor = driver.SPARSE_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no further files: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TwoFourConfig":
        """Read the entry `quantization_config` of config.json.

        Raises:
            ModelError: the entry is not of this method.
        """
        return cls(quantization.layers_of(config))

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Refuse a folder whose files changed after export, before any weight is used.

        Models of the Hugging Face Hub are not checked here: they are fetched later, and its client
        compares them with their hashes.

        Raises:
            IntegrityError: a file is not the one that was written.
            ModelError: the packed weights are not those of the layers in config.json.
        """
        if Path(model_name).is_dir():
            quantization.require_intact(Path(model_name), self.layers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Translate the names of the layers from config.json to those of vLLM's model."""
        self.layers = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.layers)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer: ours if packed, vLLM's if dense, None if not linear.

        Raises:
            UsageError: the layer is fused from packed and dense layers, or LoRA is asked for.
        """
        if not isinstance(layer, LinearBase):
            return None
        parts = self._parts(prefix)
        packed = [part in self.layers for part in parts]
        if not any(packed):
            return UnquantizedLinearMethod()
        if not all(packed):
            dense = ", ".join(part for part in parts if part not in self.layers)
            raise UsageError(
                f"{prefix}: vLLM runs {', '.join(parts)} as one layer, and {dense} is not packed",
                fix="export the model again with `thanos-deploy export OUT --target vllm`, which "
                "stores the parts of such a layer alike",
            )
        if get_current_vllm_config().lora_config is not None:
            raise _lora_refused(prefix)
        return TwoFourLinearMethod(prefix)

    def _parts(self, prefix: str) -> list[str]:
        """Full names of the checkpoint's layers that vLLM fuses into one layer."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]


def register() -> None:
    """Register the method with vLLM, and a check that refuses LoRA before an engine starts."""
    register_quantization_config(quantization.METHOD)(TwoFourConfig)
    if LoRAConfig.verify_with_model_config is not _verify_adapters:
        LoRAConfig.verify_with_model_config = _verify_adapters


_verify = LoRAConfig.verify_with_model_config


def _verify_adapters(self: LoRAConfig, model_config: Any) -> None:
    """Refuse LoRA for a model with packed layers; replaces a check of vLLM.

    vLLM calls it before it starts other processes. `TwoFourConfig.get_quant_method` refuses LoRA
    too, but in a worker process, whose message is not among the last lines of the output.

    Raises:
        UsageError: layers of the model are packed.
    """
    if model_config.quantization == quantization.METHOD:
        raise _lora_refused(model_config.model)
    _verify(self, model_config)


def _lora_refused(where: str) -> UsageError:
    return UsageError(
        f"{where}: LoRA is not supported on packed 2:4 layers",
        fix="leave out --enable-lora, or merge the adapter into the weights before pruning",
    )
