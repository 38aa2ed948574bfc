"""A linear layer as a matrix [outputs, inputs], whichever class of layer holds it.

A layer is a module: PyTorch's, GPT-2's, or an expert's, whose weight is a slice of a parameter of
the library; see `experts`.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thanos_deploy.model.experts import Expert


def matrix(linear: nn.Module) -> Tensor:
    """The weight as [outputs, inputs]; a view, so writing to it changes the layer.

    GPT-2's Conv1D stores it the other way round.
    """
    return turned(linear, linear.get_parameter("weight"))


def turned(linear: nn.Module, stored: Tensor) -> Tensor:
    """As [outputs, inputs] a tensor that has the shape of a layer's weight as it is stored."""
    return stored.T if isinstance(linear, Conv1D) else stored


def entrance(block: nn.Module, name: str) -> nn.Module:
    """The module that is called with what a linear layer reads, as its first argument.

    Args:
        block: where the layer is.
        name: of the layer, seen from the block.
    """
    parent, _, layer = name.rpartition(".")
    expert = block.get_submodule(parent)
    return expert.entrance(layer) if isinstance(expert, Expert) else block.get_submodule(name)


def replace(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer another matrix, of any shape.

    Args:
        linear: the layer.
        weight: [outputs, inputs].
        bias: [outputs], or None for a layer without one.
    """
    outputs, inputs = weight.shape
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = outputs, inputs
        weight = weight.T
    else:
        assert isinstance(linear, nn.Linear)
        linear.out_features, linear.in_features = outputs, inputs
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)


def keep_outputs(linear: nn.Module, kept: Tensor) -> None:
    """Cut a layer down to some of its outputs.

    Args:
        linear: the layer.
        kept: int64[count], the outputs that stay, in their new order.
    """
    bias = getattr(linear, "bias", None)
    replace(linear, matrix(linear)[kept], None if bias is None else bias[kept])


def resize(linear: nn.Module, outputs: int, inputs: int) -> None:
    """Give a layer without storage another shape."""
    bias = getattr(linear, "bias", None)
    replace(
        linear,
        torch.empty(outputs, inputs, device="meta"),
        None if bias is None else torch.empty(outputs, device="meta"),
    )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
