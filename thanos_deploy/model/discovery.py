"""Find the structure of a model whose type has no row in `families`, by one forward pass.

The pass computes shapes alone (`FakeTensorMode` of PyTorch), so a model of any size takes no
memory. It shows the list of blocks, the linear layers in each block, their order, and which of them
read the same tensor. Patterns that keep the shapes of weights need nothing else. The pass does not
show which rows and columns belong to a head or a channel, so heads and channels cannot be removed.

`calibration` goes from block to block and passes on nothing but the hidden states. A model that
does not work this way is refused.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from thanos_deploy.errors import ModelError, boundary
from thanos_deploy.model import pretrained
from thanos_deploy.model.families import Channels, Family, Heads

# Shape of the batch for the forward pass: [sequences, tokens].
_BATCH = (2, 6)

# Parts of the names of attention modules.
_ATTENTION = ("attn", "attention")

_FIX = "use a model of a supported type, or add a row for this type: docs/develop/add-a-family.md"


@dataclass(slots=True)
class _Seen:
    """The tensors seen in one forward pass through the blocks.

    All of them stay referenced, so that no two tensors can have the same `id`.

    Attributes:
        entered: the hidden states that each block was called with.
        left: the output of each block.
        read: for each block, maps the name of a linear layer to its input, in the order of the
            calls.
    """

    entered: list[Tensor] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    read: list[dict[str, Tensor]] = field(default_factory=list)


def discover(config: PretrainedConfig) -> Family:
    """Describe a model of a type that has no row.

    Raises:
        ModelError: the structure is not supported; the message has the reason.
    """
    kind = str(config.model_type)
    with (
        boundary(
            ModelError,
            f"model type {kind!r} is not supported: there is no row for it in "
            "thanos_deploy/model/families.py, and the forward pass that should find its "
            "blocks failed",
            fix=_FIX,
        ),
        _quietly(),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        model: Any = pretrained.make_model(deepcopy(config))
        model.eval()
        blocks = _blocks(model, int(config.num_hidden_layers))
        _require_matrices(kind, model.get_submodule(blocks))
        seen = _pass(model, model.get_submodule(blocks))
    gives = _given(kind, seen, model.get_submodule(blocks))
    inputs = _merged(kind, seen.read)
    _require_all(kind, inputs, model.get_submodule(blocks))
    attention = [
        name
        for group in inputs
        for name in group
        if any(part in name.rpartition(".")[0] for part in _ATTENTION)
    ]
    return Family(
        model_types=(kind,),
        blocks=blocks,
        inputs=inputs,
        heads=Heads(
            producers=tuple(attention[:-1]),
            layout="separate",
            consumer=attention[-1] if attention else "",
            fixed="its model type has no row in thanos_deploy/model/families.py, so its heads "
            "and channels are not known",
        ),
        channels=Channels((), ""),
        transposed=_transposed(kind, model.get_submodule(blocks)),
        gives=gives,
        discovered=True,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence `FakeTensorMode`'s log of an operation that fails; the exception says the same."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _blocks(model: PreTrainedModel, count: int) -> str:
    """Return the name of the only outermost `ModuleList` with `count` modules.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and "." in name
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{o}.") for o in lists)]
    if len(outermost) != 1:
        raise ValueError(
            f"{len(outermost)} lists of {count} modules, where one was expected: "
            f"{', '.join(outermost)}"
        )
    return str(outermost[0])


def _require_matrices(kind: str, blocks: nn.Module) -> None:
    """Refuse blocks that keep several matrices in one parameter, as transformers keeps experts.

    Raises:
        ModelError: a parameter has more than two dimensions and is not the weight of a convolution.
    """
    for name, parameter in blocks.named_parameters():
        module = blocks.get_submodule(name.rpartition(".")[0])
        if parameter.ndim > 2 and not isinstance(module, nn.Conv1d):
            raise ModelError(
                f"model type {kind!r} is not supported: there is no row for it, and block "
                f"{name.partition('.')[0]} has several matrices in one parameter, "
                f"{name.partition('.')[2]} {list(parameter.shape)}, so there is no linear "
                "layer to prune",
                fix=_FIX,
            )


def _pass(model: PreTrainedModel, blocks: nn.Module) -> _Seen:
    seen = _Seen()

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.entered.append(arguments[0])
        seen.read.append({})

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.left.append(output)

    def reading(name: str) -> Any:
        def read(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if name in seen.read[-1]:
                raise ValueError(f"{name} is called twice in one block")
            seen.read[-1][name] = arguments[0]

        return read

    for block in blocks.children():
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(reading(name))
    model.base_model(input_ids=torch.zeros(_BATCH, dtype=torch.long), use_cache=False)
    return seen


def _given(kind: str, seen: _Seen, blocks: nn.Module) -> int:
    """Return the number of outputs of a block; see `Family.gives`.

    Raises:
        ModelError: the output of a block is not exactly the input of the next block, so a walk from
            block to block cannot reproduce the pass.
    """
    count = len(list(blocks.children()))
    left = [out[0] if isinstance(out, tuple) and out else out for out in seen.left]
    gives = {len(out) if isinstance(out, tuple) else 1 for out in seen.left}
    reason = ""
    if len(left) != count:
        reason = f"its {count} blocks were called {len(left)} times"
    elif len(gives) > 1 or not all(isinstance(one, Tensor) for one in left):
        reason = "its blocks do not return hidden states"
    elif any(one is not two for one, two in zip(left[:-1], seen.entered[1:], strict=True)):
        reason = "the input of a block is not the output of the block before it"
    if reason:
        raise ModelError(
            f"model type {kind!r} is not supported: there is no row for it, and {reason}", fix=_FIX
        )
    return gives.pop()


def _merged(kind: str, read: Sequence[dict[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Merge the groups of layers with the same input over all blocks, in the order of their calls.

    Blocks may differ in the groups that they have.

    Raises:
        ModelError: a layer is in different groups in different blocks, or the order differs.
    """
    groups: list[tuple[str, ...]] = []
    orders = []
    for block in read:
        by_input: dict[int, list[str]] = {}
        for name, tensor in block.items():
            by_input.setdefault(id(tensor), []).append(name)
        orders.append([tuple(group) for group in by_input.values()])
        place = 0
        for group in orders[-1]:
            if group not in groups:
                groups.insert(place, group)
            place = groups.index(group) + 1
    names = [name for group in groups for name in group]
    in_order = all([group for group in groups if group in order] == order for order in orders)
    if len(set(names)) < len(names) or not in_order:
        raise ModelError(
            f"model type {kind!r} is not supported: there is no row for it, and layers of the same "
            "name read different inputs in different blocks, or in another order",
            fix=_FIX,
        )
    return tuple(groups)


def _require_all(kind: str, inputs: tuple[tuple[str, ...], ...], blocks: nn.Module) -> None:
    """Refuse blocks with linear layers that the pass did not call.

    Raises:
        ModelError: the pass did not call a linear layer.
    """
    known = {name for group in inputs for name in group}
    for name, module in blocks.named_modules():
        layer = name.partition(".")[2]
        if isinstance(module, nn.Linear | Conv1D) and layer not in known:
            raise ModelError(
                f"model type {kind!r} is not supported: there is no row for it, and a "
                f"forward pass does not call the layer {layer} of block "
                f"{name.partition('.')[0]}, although it may use the weight of that layer",
                fix=_FIX,
            )


def _transposed(kind: str, blocks: nn.Module) -> bool:
    """Return whether the layers store their weights as [inputs, outputs].

    Raises:
        ModelError: the blocks have both kinds of linear layers, or no linear layer.
    """
    found = {
        isinstance(module, Conv1D)
        for module in blocks.modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if len(found) != 1:
        raise ModelError(
            f"model type {kind!r} is not supported: there is no row for it, and its blocks have "
            + ("two kinds of linear layers" if found else "no linear layer"),
            fix=_FIX,
        )
    return found.pop()
