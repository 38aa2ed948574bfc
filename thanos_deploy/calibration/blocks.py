"""The inputs of a model's blocks: hidden states, and the other arguments of each block's call."""

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
        """Return the arguments for some sequences of a batch, on the block's device.

        Tensors with one entry per sequence are sliced; all others are passed as they are.

        Args:
            rows: which sequences.
            batch: number of sequences in the batch.
            device: where the block is.
        """

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            each = value.ndim > 1 and len(value) == batch
            return (value[rows] if each else value).to(device)

        return Arguments(*tree_map(cut, (self.positional, self.named)))


def shared(arguments: Sequence[Arguments], known: Sequence[Arguments]) -> list[Arguments]:
    """Return the arguments of every block, sharing tensors that equal those of another batch.

    Positions and masks are mostly the same for every batch, so memory does not grow with the number
    of batches.

    Args:
        arguments: the arguments of a batch, for each block.
        known: the arguments of another batch, for each block.
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
        arguments: the arguments of each block besides the hidden states; models with several kinds
            of blocks pass each kind its own. They are moved to the block's device for each call.
        shard: number of the batch's shard; see `thanos_deploy.ranks.shards`. Only the rank that has
            the shard has the batch's hidden states.
        counted: whether the batch enters the statistics. Batches that do not are used for tuning
            only, and their shards have the last numbers.
        products: dtype to which the factors of matrix products are rounded in the forward pass;
            None for the dtype of the hidden states.
        paused: the batch's forward pass through the block, if it is waiting at a layer.
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
        """The hidden states that enter the block, [batch, tokens, width], on the block's device."""

    @property
    @abstractmethod
    def left(self) -> Tensor:
        """The output of the block that the batch passed last, [batch, tokens, width]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the hidden states: (batch, tokens, width)."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor, in the dtype and on the device of the hidden states."""

    @abstractmethod
    def leave(self, hidden: Tensor) -> None:
        """Record the output of the block for this batch.

        Args:
            hidden: [batch, tokens, width], the output of the block.
        """

    def forward(self, index: int, block: nn.Module, rows: slice = slice(None)) -> Tensor:
        """Return the output of the block for this batch, or for some of its sequences."""
        return self.forward_of(self.hidden[rows], index, block, rows, self.products)

    def forward_of(
        self,
        hidden: Tensor,
        index: int,
        block: nn.Module,
        rows: slice,
        products: torch.dtype | None = None,
    ) -> Tensor:
        """Return the output of the block for some sequences of the batch.

        The hidden states are an argument, so that a rank without the batch's shard can run it.

        Args:
            hidden: [sequences, tokens, width], the hidden states of these sequences.
            index: number of the block.
            block: the block.
            rows: which sequences of the batch they are.
            products: see `BlockInputs`.
        """
        arguments = self.arguments[index].of(rows, self.shape[0], hidden.device)
        # autocast is a context of the whole thread, in which other passes run while one waits.
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
    """A batch whose hidden states are in memory; the output of a block is the next one's input."""

    def __init__(self, hidden: Tensor, arguments: list[Arguments]) -> None:
        """Begin before a block.

        Args:
            hidden: [batch, tokens, width], the hidden states that enter it.
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
        """See `BlockInputs.left`; the same tensor as `hidden`, which `leave` replaces."""
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
    """Stand-in for a block that records its arguments and returns its input."""

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
    """Return, for each batch, the input of the first block and the other arguments of every block.

    Only the part of the model before the blocks is computed, so the blocks need no weights.

    Args:
        model: the causal model; everything outside its blocks must have weights.
        family: describes where the blocks are.
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
