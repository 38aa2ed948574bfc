"""The operator `thanos_deploy::sparse_linear`: y = x W^T + b with W 2:4, by any of the kernels.

PyTorch sees one operator with tensors as inputs and a rule for the shape of its output, so it works
with `torch.compile` and CUDA graphs. The operator decides by the number of tokens which kernel
runs. This project's engines and its plugin for vLLM both call it.

Every kernel has its own layout of a weight, a list of tensors; see `_KERNELS`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from thanos_deploy.model.packing import require_semi_structured

OPERATOR = "thanos_deploy::sparse_linear"


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One way to multiply with a 2:4 weight.

    Attributes:
        check: refuses a weight [outputs, inputs] that the kernel does not take. Called with the
            weight and its name, before the device is checked.
        hold: packs a weight into tensors. Called with the weight and its name.
        tensors: number of these tensors.
        multiply: returns [tokens, outputs]. Called with x [tokens, inputs], the tensors, the bias
            or None, and the number of outputs.
    """

    check: Callable[[Tensor, str], None]
    hold: Callable[[Tensor, str], tuple[Tensor, ...]]
    tensors: int
    multiply: Callable[[Tensor, Sequence[Tensor], Tensor | None, int], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A weight in the layout of one kernel, or of several for different numbers of tokens.

    Attributes:
        plan: the kernel for each number of tokens; see `plan_of`.
        tensors: tensors of all kernels of the plan, in the order in which it first names them.
        outputs: number of rows of the weight.
    """

    plan: str
    tensors: tuple[Tensor, ...]
    outputs: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply: x [tokens, inputs] gives [tokens, outputs]."""
        return sparse_linear(x, list(self.tensors), bias, self.plan, self.outputs)


def hold(
    kernel: str, weight: Tensor, name: str, *, before: Callable[[], None] = lambda: None
) -> Held:
    """Pack a weight in the layout of one kernel.

    Args:
        kernel: one of `kernels()`.
        weight: [outputs, inputs].
        name: name of the weight, for the message of an error.
        before: called between the check of the weight and the work on the device.

    Raises:
        InputError: the kernel does not take the shape or dtype, or the weight is not 2:4.
    """
    how = _KERNELS[kernel]
    how.check(weight, name)
    before()
    return Held(kernel, how.hold(weight, name), len(weight))


def by_tokens(held: Sequence[Held], ends: Sequence[int]) -> Held:
    """Combine several kernels into one product that picks a kernel by the number of tokens.

    Args:
        held: for each range of numbers of tokens, the weight in the layout of its kernel; the same
            object for ranges with the same kernel.
        ends: the most tokens of each range except the last, ascending.
    """
    names = [one.plan for one in held]
    tensors = {one.plan: one.tensors for one in held}
    flat = tuple(tensor for its in tensors.values() for tensor in its)
    return Held(plan_of(names, ends), flat, held[0].outputs)


def plan_of(kernels: Sequence[str], ends: Sequence[int]) -> str:
    """Encode kernels and the most tokens of each, such as "triton:1,mma-sp:16,cusparselt".

    Args:
        kernels: the kernel for each range of numbers of tokens.
        ends: see `by_tokens`.
    """
    ranges = [
        f"{kernel}:{end}"
        for kernel, end, following in zip(kernels, ends, kernels[1:], strict=False)
        if kernel != following
    ]
    return ",".join([*ranges, kernels[-1]])


def kernels() -> list[str]:
    """Return the names of all kernels."""
    return list(_KERNELS)


def sparse_linear(
    x: Tensor, held: list[Tensor], bias: Tensor | None, plan: str, outputs: int
) -> Tensor:
    """Call the operator.

    Args:
        x: [tokens, inputs] in the weight's dtype.
        held: the weight in the layouts of the plan's kernels; see `Held.tensors`.
        bias: [outputs].
        plan: the kernel for each number of tokens; see `plan_of`.
        outputs: number of rows of the weight.

    Returns:
        Contiguous [tokens, outputs].
    """
    y: Tensor = torch.ops.thanos_deploy.sparse_linear(x, held, bias, plan, outputs)
    return y


@lru_cache
def _ranges(plan: str) -> tuple[tuple[float, str, slice], ...]:
    """Parse a plan: the most tokens of each range, its kernel, and the slice of its tensors."""
    places: dict[str, slice] = {}
    ranges = []
    for part in plan.split(","):
        kernel, _, end = part.partition(":")
        begin = max((place.stop for place in places.values()), default=0)
        places.setdefault(kernel, slice(begin, begin + _KERNELS[kernel].tensors))
        ranges.append((float(end or "inf"), kernel, places[kernel]))
    return tuple(ranges)


def _multiply(
    x: Tensor, held: list[Tensor], bias: Tensor | None, plan: str, outputs: int
) -> Tensor:
    kernel, place = next((kernel, place) for end, kernel, place in _ranges(plan) if len(x) <= end)
    return _KERNELS[kernel].multiply(x, held[place], bias, outputs)


def _shape(x: Tensor, held: list[Tensor], bias: Tensor | None, plan: str, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


torch.library.define(
    OPERATOR, "(Tensor x, Tensor[] held, Tensor? bias, str plan, int outputs) -> Tensor"
)
torch.library.impl(OPERATOR, ("CPU", "CUDA"))(_multiply)
torch.library.register_fake(OPERATOR)(_shape)


def _no_check(weight: Tensor, name: str) -> None:
    """Check nothing: `_Kernel.hold` checks the weight."""


def _library(name: str) -> Callable[[Tensor, str], None]:
    return lambda weight, of: require_semi_structured(weight, name, of)


def _hold_dense(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    return (weight.contiguous(),)


def _dense(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    return nn.functional.linear(x, held[0], bias)


def _hold_cutlass(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    with _quiet():
        sparse = _cutlass_class().from_dense(weight.contiguous())
    return sparse.packed, sparse.meta


def _cutlass(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    packed, meta = held
    with _quiet():
        sparse = _cutlass_class()(
            torch.Size((outputs, x.shape[1])),
            packed=packed,
            meta=meta,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
    # torch's operator returns a transposed view.
    return nn.functional.linear(x, sparse, bias).contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the `with` statement, torch does not warn that the API of its tensors may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        yield


def _cutlass_class() -> Any:
    return torch.sparse.SparseSemiStructuredTensorCUTLASS


def _hold_cusparselt(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    from runtime.kernels.cusparselt import CusparseltWeight

    return (CusparseltWeight.of(weight).compressed,)


def _cusparselt(
    x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int, *, search: bool
) -> Tensor:
    from runtime.kernels.cusparselt import CusparseltWeight, linear

    weight = CusparseltWeight(held[0], outputs, x.shape[1])
    return linear(x, weight, bias, search=search)


def _searched(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    return _cusparselt(x, held, bias, outputs, search=True)


def _first(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    return _cusparselt(x, held, bias, outputs, search=False)


def _hold_triton(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    from runtime.kernels.packed import PackedWeight

    packed = PackedWeight.of(weight, name)
    return packed.words, packed.mask


def _triton(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    """Multiply with the Triton kernel for the number of tokens: `decode` or `prefill`."""
    from runtime.kernels import decode, prefill
    from runtime.kernels.packed import PackedWeight

    words, mask = held
    packed = PackedWeight(words, mask, x.shape[1], x.dtype)
    if len(x) <= decode.MOST_TOKENS:
        return decode.linear(x, packed, bias)
    return prefill.linear(x, packed, bias)


def _hold_mma(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    from runtime.kernels.sparse_mma import SparseMmaWeight

    packed = SparseMmaWeight.of(weight, name)
    return packed.values, packed.metadata, packed.arrivals


def _mma(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    from runtime.kernels.sparse_mma import SparseMmaWeight, linear

    values, metadata, arrivals = held
    packed = SparseMmaWeight(values, metadata, arrivals, outputs, x.shape[1])
    return linear(x, packed, bias)


def _hold_blockwise(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    from runtime.kernels import blockwise

    return blockwise.hold(weight, name)


def _blockwise(x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int) -> Tensor:
    from runtime.kernels import blockwise

    planes, codes = held
    return blockwise.linear(x, planes, codes, bias)


# The packages of a kernel may be missing, so the functions above import them when they are called.
_KERNELS: dict[str, _Kernel] = {
    "dense": _Kernel(_no_check, _hold_dense, 1, _dense),
    "cutlass": _Kernel(_library("cutlass"), _hold_cutlass, 2, _cutlass),
    "cusparselt": _Kernel(_library("cusparselt"), _hold_cusparselt, 1, _searched),
    "cusparselt-first": _Kernel(_library("cusparselt"), _hold_cusparselt, 1, _first),
    "triton": _Kernel(_no_check, _hold_triton, 2, _triton),
    "mma-sp": _Kernel(_no_check, _hold_mma, 3, _mma),
    "blockwise": _Kernel(_no_check, _hold_blockwise, 2, _blockwise),
}
