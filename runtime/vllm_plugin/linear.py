"""Linear layers of vLLM that multiply with packed 2:4 weights.

While vLLM loads a model, the weight of such a layer is two parameters, `weight.values` and
`weight.mask`, in the layout of the files; see `thanos_deploy.model.packing`. In both, rows are
outputs, so vLLM's own loaders find the rows of fused and of column-parallel layers; and each rank
of a row-parallel layer gets a contiguous range of columns. After loading, tensors in the layout of
the machine's kernels replace the two parameters.
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

# Columns for each byte of the mask.
_COLUMNS = 8


@register_weight_loader_v2_supported_method
class TwoFourLinearMethod(LinearMethodBase):
    """Creates, loads and runs a packed layer for vLLM.

    Attributes:
        name: name of the layer, for messages.
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
        """Create the parameters that vLLM loads.

        Raises:
            UsageError: tensor parallelism would split a byte of the mask between two ranks.
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
        """Replace the loaded parameters by tensors in the layout of the kernels."""
        held = held_by(layer.weight.values.data, layer.weight.mask.data, self.name)
        del layer.weight
        for number, tensor in enumerate(held.tensors):
            layer.register_parameter(f"held_{number}", nn.Parameter(tensor, requires_grad=False))
        layer.plan, layer.outputs, layer.tensors = held.plan, held.outputs, len(held.tensors)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: x [..., inputs] gives [..., outputs]."""
        held = [getattr(layer, f"held_{number}") for number in range(layer.tensors)]
        y = sparse_linear(x.reshape(-1, x.shape[-1]), held, bias, layer.plan, layer.outputs)
        return y.reshape([*x.shape[:-1], layer.outputs])
