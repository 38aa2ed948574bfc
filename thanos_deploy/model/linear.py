"""Access to a linear layer as a matrix [outputs, inputs], independent of the class of the layer.

A layer is PyTorch's `nn.Linear`, GPT-2's `Conv1D`, or the layer of an expert, whose weight is a
slice of a larger parameter; see `experts`.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thanos_deploy.model.experts import Expert


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight as [outputs, inputs]; a view, so writing to it changes the layer.

    GPT-2's `Conv1D` stores the transposed matrix.
    """
    return turned(linear, linear.get_parameter("weight"))


def turned(linear: nn.Module, stored: Tensor) -> Tensor:
    """Return a tensor as [outputs, inputs]; a view.

    Args:
        linear: the layer.
        stored: a tensor with the shape in which the layer stores its weight.
    """
    return stored.T if isinstance(linear, Conv1D) else stored


def entrance(block: nn.Module, name: str) -> nn.Module:
    """Return the module whose first argument is the input of a linear layer, as a place for hooks.

    Args:
        block: the block that the layer is in.
        name: name of the layer, relative to the block.
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
