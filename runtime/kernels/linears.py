"""The linear layers of a model, exchanged for ones that multiply with 2:4 weights."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from thanos_deploy import gpu
from thanos_deploy.errors import PlatformError
from thanos_deploy.linear import matrix
from thanos_deploy.packing import require_semi_structured

# x [tokens, inputs], bias [outputs] or None -> [tokens, outputs]
Multiply = Callable[[Tensor, Tensor | None], Tensor]


class SparseLinear(nn.Module):
    """A linear layer whose weight is held by what multiplies with it."""

    def __init__(self, multiply: Multiply, bias: Tensor | None) -> None:
        super().__init__()
        self._multiply = multiply
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], contiguous.

        Some libraries give a transposed view. Heads that are split from one have no channels side
        by side, and attention would take its slow path.
        """
        y = self._multiply(x.reshape(-1, x.shape[-1]), self.bias)
        return y.contiguous().reshape(*x.shape[:-1], -1)


def semi_structured(weight: Tensor, name: str, library: str) -> Multiply:
    """Multiply with torch's own semi-structured tensors.

    Args:
        weight: [outputs, inputs], on a GPU.
        name: for the message.
        library: "cutlass" or "cusparselt".

    Raises:
        ModelError: the library does not take the weight, or it is not 2:4.
    """
    require_semi_structured(weight.cpu(), library, name)
    held: Any = {
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    }[library]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        sparse = held.from_dense(weight.contiguous())
    return lambda x, bias: nn.functional.linear(x, sparse, bias)


def triton(weight: Tensor, name: str) -> Multiply:
    """Multiply with the two Triton kernels: one for few tokens, one for many.

    Raises:
        InputError: the kernels do not take the dtype, or the weight is not 2:4.
    """
    from runtime.kernels import decode, prefill
    from runtime.kernels.packed import PackedWeight

    packed = PackedWeight.of(weight, name)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) <= decode.MOST_TOKENS:
            return decode.linear(x, packed, bias)
        return prefill.linear(x, packed, bias)

    return multiply


def sparse_mma(weight: Tensor, name: str) -> Multiply:
    """Multiply on sparse tensor cores, with the kernel in CUDA C++.

    Raises:
        InputError: the kernel does not take the dtype, or the weight is not 2:4.
    """
    from runtime.kernels.sparse_mma import SparseMmaWeight, linear

    packed = SparseMmaWeight.of(weight, name)
    return lambda x, bias: linear(x, packed, bias)


MAKERS: dict[str, Callable[[Tensor, str], Multiply]] = {
    "cutlass": lambda weight, name: semi_structured(weight, name, "cutlass"),
    "cusparselt": lambda weight, name: semi_structured(weight, name, "cusparselt"),
    "triton": triton,
    "mma-sp": sparse_mma,
}


def require_capability(maker: str, capability: tuple[int, int]) -> None:
    """Refuse a GPU on which a kernel does not run.

    Args:
        maker: a key of `MAKERS`.
        capability: compute capability of the GPU.

    Raises:
        PlatformError: it does not run there.
    """
    found = f"variant {maker}: the GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < gpu.SPARSE_CAPABILITY:
        raise PlatformError(found, fix="use a GPU of compute capability 8.0 or later")
    # libtorch: "Supported only on GPUs with compute capability 8.x".
    if maker == "cutlass" and capability[0] != gpu.SPARSE_CAPABILITY[0]:
        raise PlatformError(
            f"{found}; PyTorch's CUTLASS kernels are for 8.x only",
            fix="use variant cusparselt, triton, mma-sp or sparse",
        )


def replace(model: nn.Module, names: Iterable[str], maker: str) -> None:
    """Exchange linear layers for ones that multiply with one kernel; see `exchange`.

    Args:
        model: where they are.
        names: their full names.
        maker: a key of `MAKERS`.

    Raises:
        InputError: a weight is not 2:4, or of a shape or dtype that is not taken; the message
            names the layer.
    """
    exchange(model, names, MAKERS[maker])


def exchange(
    model: nn.Module, names: Iterable[str], make: Callable[[Tensor, str], Multiply]
) -> None:
    """Exchange linear layers, one at a time, so that one weight at most is there twice.

    Args:
        model: where they are.
        names: their full names.
        make: what multiplies, given a weight and the name of its layer.

    Raises:
        InputError: a weight is not taken; the message names the layer.
    """
    for name in names:
        linear = model.get_submodule(name)
        bias = getattr(linear, "bias", None)
        multiply = make(matrix(linear).detach(), name)
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            SparseLinear(multiply, None if bias is None else bias.detach()),
        )
