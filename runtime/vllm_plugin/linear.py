"""Linear layers of vLLM that multiply with packed 2:4 weights.

The weight of such a layer is two parameters, `weight.values` and `weight.mask`, as the files have
them; see `thanos_deploy.model.packing`. Rows are outputs in both, so vLLM's own loaders find the
rows of fused and of column-parallel layers; and both have a run of columns for each rank of a
row-parallel layer. When all are loaded, they are put in the order that the kernels of the machine
read, and go.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from runtime.kernels.operator import sparse_linear
from runtime.vllm_plugin.layout import held_by
from thanos_deploy.errors import UsageError

# Columns whose places are one byte of the mask.
_COLUMNS = 8


@register_weight_loader_v2_supported_method
class TwoFourLinearMethod(LinearMethodBase):
    """How vLLM makes, loads and runs a packed layer.

    Attributes:
        name: of the layer, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Make the parameters that vLLM loads.

        Raises:
            UsageError: tensor parallelism would cut through a byte of the mask.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if columns != input_size and columns % _COLUMNS:
            raise UsageError(
                f"{self.name}: {input_size // columns} ranks would get {columns} of {input_size} "
                f"columns each, and packed 2:4 weights are cut only between runs of {_COLUMNS}",
                fix="choose another --tensor-parallel-size",
            )

        def parameter(width: int, dtype: torch.dtype) -> ModelWeightParameter:
            return ModelWeightParameter(
                data=torch.empty(rows, width, dtype=dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=attributes["weight_loader"],
            )

        layer.weight = nn.Module()
        layer.weight.register_parameter("values", parameter(columns // 2, params_dtype))
        layer.weight.register_parameter("mask", parameter(-(-columns // _COLUMNS), torch.uint8))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight as the kernels read it, and nothing else of it."""
        held = held_by(layer.weight.values.data, layer.weight.mask.data, self.name)
        del layer.weight
        for number, tensor in enumerate(held.tensors):
            layer.register_parameter(f"held_{number}", nn.Parameter(tensor, requires_grad=False))
        layer.plan, layer.outputs, layer.tensors = held.plan, held.outputs, len(held.tensors)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., inputs] -> [..., outputs]."""
        held = [getattr(layer, f"held_{number}") for number in range(layer.tensors)]
        y = sparse_linear(x.reshape(-1, x.shape[-1]), held, bias, layer.plan, layer.outputs)
        return y.reshape([*x.shape[:-1], layer.outputs])
