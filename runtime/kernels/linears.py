"""Replace the linear layers of a model by layers that multiply with 2:4 weights.

    cutlass           torch's semi-structured tensors; compute capability 8.x only
    cusparselt        cuSPARSELt, with the algorithm that it finds fastest for each size
    cusparselt-first  cuSPARSELt with its first algorithm, torch's default, for comparison
    triton            this project's Triton kernels
    mma-sp            this project's kernels in CUDA C++
    blockwise         on a CPU; see `runtime.kernels.blockwise`

All return contiguous [tokens, outputs]. A CUDA graph can capture a call after the first call for
the same number of tokens, which compiles, tunes or searches. All are called through the operator of
`runtime.kernels.operator`, which is opaque to `torch.compile`.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from runtime.kernels.operator import Held, hold
from thanos_deploy.errors import PlatformError
from thanos_deploy.gpu import driver
from thanos_deploy.model.linear import matrix

# x [tokens, inputs], bias [outputs] or None -> [tokens, outputs]
Multiply = Callable[[Tensor, Tensor | None], Tensor]

# The kernel for CPUs; not in `MAKERS`, which are for GPUs.
BLOCKWISE = "blockwise"

# libtorch: "Supported only on GPUs with compute capability 8.x".
_CUTLASS_MAJOR = 8


class SparseLinear(nn.Module):
    """A linear layer that multiplies with a packed weight, which its `Multiply` holds."""

    def __init__(self, multiply: Multiply, bias: Tensor | None) -> None:
        super().__init__()
        self._multiply = multiply
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]."""
        return self._multiply(x.reshape(-1, x.shape[-1]), self.bias).reshape(*x.shape[:-1], -1)


def require(maker: str, device: torch.device) -> None:
    """Refuse a device on which a kernel does not run.

    Args:
        maker: a key of `MAKERS`, "sparse" for any of them, or `BLOCKWISE`.
        device: the device of the weights.

    Raises:
        PlatformError: the device is of the wrong kind, the kernel does not support it, or a package
            is missing.
    """
    if maker == BLOCKWISE:
        _require_cpu(device)
        return
    if maker == "triton":
        _require_triton()
        if device.type == "cpu" and _interprets():
            return
    if device.type != "cuda":
        raise PlatformError(
            f"{maker} runs on an NVIDIA GPU only, and the weights are on {device}",
            fix="move the model to a GPU of compute capability 8.0 or later",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < driver.SPARSE_CAPABILITY:
        raise PlatformError(
            f"{maker}: the GPU has compute capability {capability[0]}.{capability[1]}",
            fix="use a GPU of compute capability 8.0 or later",
        )
    if maker == "cutlass" and capability[0] != _CUTLASS_MAJOR:
        raise PlatformError(
            f"cutlass: PyTorch's CUTLASS kernels for 2:4 run on compute capability 8.x only, and "
            f"the GPU has {capability[0]}.{capability[1]}",
            fix="use cusparselt, triton or mma-sp on this GPU",
        )
    if maker in ("cusparselt", "cusparselt-first") and not torch.backends.cusparselt.is_available():
        raise PlatformError(
            f"{maker}: this build of PyTorch has no cuSPARSELt",
            fix="use a CUDA build of PyTorch with it, or triton or mma-sp",
        )


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise PlatformError(
            f"{BLOCKWISE} runs on a CPU only, and the weights are on {device}",
            fix=f"use one of {', '.join(MAKERS)}",
        )


def _require_triton() -> None:
    try:
        import triton  # noqa: F401 - its absence is told here
    except ImportError as error:
        raise PlatformError(
            "the package triton is not installed", fix="pip install 'thanos-deploy[kernels]'"
        ) from error


def _interprets() -> bool:
    """Whether Triton's interpreter runs the kernels instead of a GPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def make(kernel: str, weight: Tensor, name: str) -> Held:
    """Pack a weight for a kernel; the result multiplies with it.

    Args:
        kernel: a key of `MAKERS`, or `BLOCKWISE`.
        weight: [outputs, inputs].
        name: name of the layer, for the message of an error.

    Raises:
        InputError: the kernel does not take the shape or dtype, or the weight is not 2:4.
        PlatformError: see `require`.
    """
    return hold(kernel, weight, name, before=lambda: require(kernel, weight.device))


MAKERS: dict[str, Callable[[Tensor, str], Multiply]] = {
    kernel: partial(make, kernel)
    for kernel in ("cutlass", "cusparselt", "cusparselt-first", "triton", "mma-sp")
}


def replace(model: nn.Module, names: Iterable[str], maker: str) -> None:
    """Replace linear layers by layers that multiply with one kernel; see `exchange`.

    Args:
        model: the model; changed in place.
        names: full names of the layers.
        maker: a key of `MAKERS`, or `BLOCKWISE`.

    Raises:
        InputError: a weight is not 2:4, or the kernel does not take its shape or dtype; the message
            names the layer.
        PlatformError: see `require`.
    """
    exchange(model, names, MAKERS.get(maker) or partial(make, maker))


def exchange(
    model: nn.Module, names: Iterable[str], make: Callable[[Tensor, str], Multiply]
) -> None:
    """Replace linear layers by `SparseLinear`.

    One layer is replaced at a time, so at most one weight is in memory both dense and packed.

    Args:
        model: the model; changed in place.
        names: full names of the layers.
        make: takes a weight [outputs, inputs] and the name of its layer, and returns the function
            that multiplies with it.
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
