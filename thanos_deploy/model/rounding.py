"""Parameters in the dtype in which they are stored or run."""

import torch
from torch import Tensor, nn

from thanos_deploy.errors import ModelError


def rounded(
    tensor: Tensor, dtype: torch.dtype, name: str, *, fix: str = "use --dtype bf16 or fp32"
) -> Tensor:
    """A copy in a dtype, without -0.0.

    Kernels that compress 2:4 weights by their bit patterns take -0.0 for a value (vLLM pull
    request 13198), and a small negative weight can become one when it is rounded.

    Args:
        tensor: of any shape, finite.
        dtype: of the copy.
        name: of the parameter, for the error.
        fix: the same.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    copy = tensor.to(dtype, copy=True).add_(0.0)
    if not bool(copy.isfinite().all()):
        raise ModelError(
            f"{name}: values up to {tensor.abs().max().item():g} do not fit {dtype}", fix=fix
        )
    return copy


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter in place; buffers such as rotary frequencies stay as they are.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    for name, parameter in model.named_parameters():
        parameter.data = rounded(parameter.detach(), dtype, name, fix="use float32")
