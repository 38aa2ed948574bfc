"""What enters the blocks of a model: hidden states, and what else every block is called with."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from thanos_deploy.calibration.passes import Pass
from thanos_deploy.model.families import Family
from thanos_deploy.model.structure import blocks_of


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a block besides the hidden states: attention mask, positions."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def of(self, rows: slice, batch: int, device: torch.device) -> "Arguments":
        """Those for some of a batch's sequences: what has one entry for each of them is cut.

        Args:
            rows: which sequences.
            batch: how many there are.
            device: where the block is.
        """

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            each = value.ndim > 1 and len(value) == batch
            return (value[rows] if each else value).to(device)

        return Arguments(*tree_map(cut, (self.positional, self.named)))


def shared(arguments: Sequence[Arguments], known: Sequence[Arguments]) -> list[Arguments]:
    """The arguments of every block, without a second copy of tensors that are known already.

    Positions and masks are mostly those of every batch, so memory does not grow with their number.

    Args:
        arguments: of a batch, for each block.
        known: of another batch.
    """
    found: dict[int, Tensor] = {}

    def one(own: Any, other: Any) -> Any:
        if not isinstance(own, Tensor) or not isinstance(other, Tensor):
            return own
        if id(own) not in found:
            same = own.dtype is other.dtype and torch.equal(own, other)
            found[id(own)] = other if same else own
        return found[id(own)]

    return [
        Arguments(*tree_map(one, (own.positional, own.named), (other.positional, other.named)))
        for own, other in zip(arguments, known, strict=True)
    ]


class BlockInputs(ABC):
    """One batch of calibration data on its way through the blocks.

    Attributes:
        arguments: the other arguments of every block; families with several kinds of blocks pass
            each kind its own. They are taken to the block's device when the batch passes it.
        shard: number of the shard that it belongs to; see `thanos_deploy.ranks.shards`. Only the
            rank that has the shard has its hidden states.
        counted: statistics are taken of it; blocks are only tuned on others, whose shards have
            the last numbers.
        products: what factors of products are rounded to on its way; None for the dtype of its
            hidden states.
        paused: its forward pass through the next block, if one waits at a layer.
    """

    def __init__(
        self,
        arguments: list[Arguments],
        shard: int = 0,
        *,
        counted: bool = True,
        products: torch.dtype | None = None,
    ) -> None:
        self.arguments, self.shard, self.counted = arguments, shard, counted
        self.products = products
        self.paused: Pass | None = None

    @property
    @abstractmethod
    def hidden(self) -> Tensor:
        """[batch, tokens, width], what enters the block, on the block's device."""

    @property
    @abstractmethod
    def left(self) -> Tensor:
        """[batch, tokens, width], what has left the block that the batch was run through last."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[batch, tokens, width] of the hidden states."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a shape, in the dtype and on the device of the hidden states."""

    @abstractmethod
    def leave(self, hidden: Tensor) -> None:
        """Leave the block.

        Args:
            hidden: [batch, tokens, width], what the block has made of the batch.
        """

    def forward(self, index: int, block: nn.Module, rows: slice = slice(None)) -> Tensor:
        """What the block makes of this batch, or of some of its sequences."""
        return self.forward_of(self.hidden[rows], index, block, rows, self.products)

    def forward_of(
        self,
        hidden: Tensor,
        index: int,
        block: nn.Module,
        rows: slice,
        products: torch.dtype | None = None,
    ) -> Tensor:
        """What the block makes of some of its sequences, which need not be on this rank.

        Args:
            hidden: [sequences, tokens, width], what enters the block of them.
            index: number of the block.
            block: the block.
            rows: which sequences.
            products: see `BlockInputs`.
        """
        arguments = self.arguments[index].of(rows, self.shape[0], hidden.device)
        # A pass that may wait must not enter a context of the whole thread.
        rounding = (
            nullcontext()
            if products in (None, hidden.dtype)
            else torch.autocast(hidden.device.type, products)
        )
        with rounding:
            output = block(hidden, *arguments.positional, **arguments.named)
        left: Tensor = output[0] if isinstance(output, tuple) else output
        return left


class LoadedInputs(BlockInputs):
    """A batch whose hidden states are in memory; what leaves a block enters the next one."""

    def __init__(self, hidden: Tensor, arguments: list[Arguments]) -> None:
        """Begin before a block.

        Args:
            hidden: [batch, tokens, width], what enters it.
            arguments: see `BlockInputs`.
        """
        super().__init__(arguments)
        self._hidden = hidden

    @property
    def hidden(self) -> Tensor:
        """See `BlockInputs.hidden`."""
        return self._hidden

    @property
    def left(self) -> Tensor:
        """See `BlockInputs.left`; the same as `hidden`, which has moved on."""
        return self._hidden

    @property
    def shape(self) -> tuple[int, ...]:
        """See `BlockInputs.shape`."""
        return tuple(self._hidden.shape)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `BlockInputs.empty`."""
        return self._hidden.new_empty(shape)

    def leave(self, hidden: Tensor) -> None:
        """See `BlockInputs.leave`."""
        self._hidden = hidden


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes its input on."""

    def __init__(self, block: nn.Module, calls: list[tuple[Tensor, Arguments]], gives: int) -> None:
        super().__init__()
        self._calls = calls
        self._gives = gives
        # Models ask their blocks for attributes, such as the kind of attention.
        self._block = (block,)  # in a tuple, so that it does not become a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Any:
        self._calls.append((hidden, Arguments(positional, named)))
        return hidden if self._gives == 1 else (hidden, *[None] * (self._gives - 1))


def block_inputs(
    model: PreTrainedModel, family: Family, batches: Iterable[Tensor]
) -> list[LoadedInputs]:
    """What enters the first block, and what every block is called with besides, for each batch.

    Only what lies before the blocks is computed, so the blocks may be without weights.

    Args:
        model: the causal model; everything outside its blocks must have weights.
        family: where its blocks are.
        batches: int64[batch, tokens] each.
    """
    blocks = blocks_of(model, family)
    calls: list[tuple[Tensor, Arguments]] = []
    originals = list(blocks)
    inputs = []
    try:
        for index, block in enumerate(originals):
            blocks[index] = _Recorder(block, calls, family.gives)
        for ids in batches:
            calls.clear()
            model.base_model(input_ids=ids, use_cache=False)
            inputs.append(LoadedInputs(calls[0][0], [arguments for _, arguments in calls]))
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return inputs
