"""What a model of a type without a row looks like, found by one forward pass through it.

The pass computes shapes alone (`FakeTensorMode` of PyTorch), so that a model of any size takes no
memory. It shows the list of blocks, the linear layers in each, their order, and which of them read
the same tensor. That is all that patterns which keep shapes need to know. It does not show which
rows and columns are a head or a channel, so that nothing can be cut out.

A model is refused that does not fit what `calibration` does: go from block to block, with the
hidden states alone.
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

# Of the batch that passes: sequences, and tokens of each.
_BATCH = (2, 6)

# What the modules of attention are called.
_ATTENTION = ("attn", "attention")

_FIX = "use a model of a supported type, or add a row for this type: docs/develop/add-a-family.md"


@dataclass(slots=True)
class _Seen:
    """What a pass through the blocks shows.

    Attributes:
        entered, left: the hidden states of each block, kept so that no two have one identity.
        read: of each block, name of a linear layer -> what it read, in the order of the calls.
    """

    entered: list[Tensor] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    read: list[dict[str, Tensor]] = field(default_factory=list)


def discover(config: PretrainedConfig) -> Family:
    """Describe a model of a type that has no row.

    Raises:
        ModelError: it does not fit, with the reason.
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
    """Without what the mode logs of an operation that fails, which is in its exception too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _blocks(model: PreTrainedModel, count: int) -> str:
    """The name of the one list of as many blocks as the configuration has."""
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
    """Refuse blocks that keep several matrices in one parameter, as the library keeps experts.

    Raises:
        ModelError: they do.
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
    """How many things a block gives; see `Family.gives`.

    Raises:
        ModelError: the walk from block to block cannot follow the pass.
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
        reason = "it computes something between two blocks"
    if reason:
        raise ModelError(
            f"model type {kind!r} is not supported: there is no row for it, and {reason}", fix=_FIX
        )
    return gives.pop()


def _merged(kind: str, read: Sequence[dict[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """The groups of all blocks in the order of their calls; blocks may differ in what they have."""
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
        ModelError: there are such.
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
    """Whether all layers store their weights as [inputs, outputs]."""
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
