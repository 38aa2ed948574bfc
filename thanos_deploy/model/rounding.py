"""Round parameters to the dtype in which they are stored or run."""

import torch
from torch import Tensor, nn

from thanos_deploy.errors import ModelError


def rounded(
    tensor: Tensor, dtype: torch.dtype, name: str, *, fix: str = "use --dtype bf16 or fp32"
) -> Tensor:
    """Return a copy of a tensor in another dtype, with -0.0 replaced by 0.0.

    Kernels that compress 2:4 weights by their bit patterns treat -0.0 as a non-zero (vLLM pull
    request 13198), and a small negative weight can be rounded to -0.0.

    Args:
        tensor: of any shape, with finite entries.
        dtype: dtype of the copy.
        name: name of the parameter for the error message.
        fix: what to do next, for the error message.

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
