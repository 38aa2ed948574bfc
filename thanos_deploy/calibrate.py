"""Calibration: a text to token segments, segments to the blocks' inputs and their statistics."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.devices import CPU
from thanos_deploy.errors import CalibrationError
from thanos_deploy.families import Family
from thanos_deploy.frame import frame_of
from thanos_deploy.passes import Pass, recorded
from thanos_deploy.precision import products_in
from thanos_deploy.texts import Text


def segments(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int | None
) -> Tensor:
    """Cut a text into segments of equal length, without overlap.

    Each begins as the tokenizer begins a text; see `frame`.

    Args:
        text: the text, tokenized as a whole.
        tokenizer: the model's.
        count: how many segments to take.
        length: tokens of each, with those that the tokenizer puts in front.
        seed: picks the segments from all over the text; None takes the first ones.

    Returns:
        int64[count, length], in the order of the text.

    Raises:
        CalibrationError: the text is too short, or a segment would be.
    """
    every = every_segment(text, tokenizer, length=length)
    if len(every) < count:
        own = length - len(frame_of(tokenizer))
        raise CalibrationError(
            f"{text.origin}: {len(_tokens(text, tokenizer))} tokens found, {count * own} needed "
            f"for {count} segments of {length}",
            fix="give a longer text, or fewer or shorter segments",
        )
    if seed is None:
        return every[:count]
    picked = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return every[picked.sort().values]


def every_segment(text: Text, tokenizer: PreTrainedTokenizerBase, *, length: int) -> Tensor:
    """All the segments that `segments` picks from; int64[available, length]."""
    frame = frame_of(tokenizer)
    if length <= len(frame):
        raise CalibrationError(
            f"segments of {length} tokens: the tokenizer puts {len(frame)} before each",
            fix="use longer segments",
        )
    return frame.before(_cut(_tokens(text, tokenizer), length - len(frame)))


def _tokens(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: that the text as a whole is longer than the model's context is intended.
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(ids: Tensor, length: int) -> Tensor:
    available = len(ids) // length
    return ids[: available * length].reshape(available, length)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a model calls a block with besides the hidden states: attention mask, positions."""

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


@dataclass(slots=True)
class BlockInputs:
    """One batch of calibration data on its way through the blocks.

    Attributes:
        hidden: [batch, tokens, width], what enters the next block, on the block's device; replaced
            as the walk goes on.
        arguments: the other arguments of every block; families with several kinds of blocks pass
            each kind its own. They are taken to the block's device when the batch passes it.
        paused: its forward pass through that block, if one waits at a layer.
    """

    hidden: Tensor
    arguments: list[Arguments]
    paused: Pass | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the hidden states."""
        return tuple(self.hidden.shape)

    @property
    def left(self) -> Tensor:
        """What has left the block that the batch was run through last."""
        return self.hidden

    def forward(self, index: int, block: nn.Module, rows: slice = slice(None)) -> Tensor:
        """What the block makes of this batch, or of some of its sequences."""
        hidden = self.hidden
        arguments = self.arguments[index].of(rows, len(hidden), hidden.device)
        output = block(hidden[rows], *arguments.positional, **arguments.named)
        left: Tensor = output[0] if isinstance(output, tuple) else output
        return left


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes its input on."""

    def __init__(self, block: nn.Module, calls: list[tuple[Tensor, Arguments]]) -> None:
        super().__init__()
        self._calls = calls
        # Models ask their blocks for attributes, such as the kind of attention.
        self._block = (block,)  # in a tuple, so that it does not become a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        self._calls.append((hidden, Arguments(positional, named)))
        return hidden


def block_inputs(
    model: PreTrainedModel, family: Family, batches: Iterable[Tensor]
) -> list[BlockInputs]:
    """What enters the first block, and what every block is called with besides, for each batch.

    Only what lies before the blocks is computed, so the blocks may be without weights.

    Args:
        model: the causal model; everything outside its blocks must have weights.
        family: where its blocks are.
        batches: int64[batch, tokens] each.
    """
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    calls: list[tuple[Tensor, Arguments]] = []
    originals = list(blocks)
    inputs = []
    try:
        for index, block in enumerate(originals):
            blocks[index] = _Recorder(block, calls)
        for ids in batches:
            calls.clear()
            model.base_model(input_ids=ids, use_cache=False)
            inputs.append(BlockInputs(calls[0][0], [arguments for _, arguments in calls]))
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return inputs


# Columns of a Gram matrix that are multiplied at once: few enough to spare most of what lies below
# the diagonal, enough for the product to run at full speed.
_COLUMNS = 512


def _runs(cols: int) -> list[tuple[int, int]]:
    """Columns in runs of about as many as are multiplied at once: first, and one after the last."""
    count = max(1, cols // _COLUMNS)
    return [(cols * k // count, cols * (k + 1) // count) for k in range(count)]


@dataclass(slots=True, eq=False)
class Statistics:
    """What calibration saw of one layer's input x, and of the same input y in the dense model.

    Attributes:
        mass: the number of tokens, or the sum of their weights.
        hessian: float32[cols, cols], the sum of x x^T over all tokens; complete below its diagonal
            once `complete` has been called.
        total: float32[cols], the sum of x.
        cross: float32[dense cols, cols], the sum of y x^T; None if the dense model was not asked
            for.
        dense_total: float32[dense cols], the sum of y; the same.
    """

    mass: float
    hessian: Tensor
    total: Tensor
    cross: Tensor | None
    dense_total: Tensor | None

    @classmethod
    def empty(
        cls, cols: int, dense_cols: int | None = None, *, device: torch.device = CPU
    ) -> "Statistics":
        """Of no tokens, for inputs that are on a device."""
        zeros = partial(torch.zeros, device=device)
        return cls(
            mass=0.0,
            hessian=zeros(cols, cols),
            total=zeros(cols),
            cross=None if dense_cols is None else zeros(dense_cols, cols),
            dense_total=None if dense_cols is None else zeros(dense_cols),
        )

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """Count some tokens; float32 or bfloat16 [tokens, cols] each."""
        # Products of bfloat16 numbers lose nothing where they are multiplied as such.
        with products_in(x.dtype):
            self._add(x.float(), None if y is None else y.float())

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        self.mass += len(x)
        self._add_product(x, x)
        self.total += x.sum(dim=0)
        if y is not None:
            assert self.cross is not None
            assert self.dense_total is not None
            self.cross.addmm_(y.T, x)
            self.dense_total += y.sum(dim=0)

    def add_weighted(self, x: Tensor, weight: Tensor) -> None:
        """Count some tokens, float32[tokens, cols], each with its weight, float32[tokens, 1]."""
        self.mass += weight.sum().item()
        self._add_product(weight * x, x)
        self.total += (weight * x).sum(dim=0)

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right, which is symmetric, on and above the diagonal."""
        for start, stop in _runs(right.shape[1]):
            self.hessian[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])

    def complete(self) -> None:
        """Fill in what is below the diagonal of the Hessian, when all tokens have been counted."""
        for start, stop in _runs(len(self.hessian)):
            block = self.hessian[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    def centred(self) -> "Statistics":
        """The same around the means: what is left for a weight to explain beside a free bias."""
        cross = self.cross
        if cross is not None:
            assert self.dense_total is not None
            cross = cross - torch.outer(self.dense_total, self.total) / self.mass
        hessian = self.hessian - torch.outer(self.total, self.total) / self.mass
        return replace(self, hessian=hessian, cross=cross)


@dataclass(slots=True)
class Walk:
    """Calibration data on its way through the blocks of one model.

    Attributes:
        index: number of the next block.
        block: that block, with weights.
        batches: what enters it, in the dtype of the weights.
        done: all of them have left it.
    """

    index: int
    block: nn.Module
    batches: list[BlockInputs]
    done: bool = False


def collect(
    walk: Walk,
    names: list[str],
    dense: Walk | None = None,
    *,
    pause: bool = False,
    last: bool = False,
) -> dict[str, Statistics]:
    """Run the data into a block, as far as the last of some linear layers.

    Args:
        walk: the model that is being pruned.
        names: linear layers of the block, in the order in which the forward pass reaches them.
        dense: the same data in the dense model, at the same block, for `Statistics.cross`.
        pause: let the forward passes wait there, and the next `collect` or `advance` go on from
            there; so no layer before the last of these may change any more.
        last: no more is wanted of this block; so the dense model's data, for which nothing changes,
            leaves it at once, and what its passes hold is free.

    Returns:
        layer name -> statistics.
    """
    sums: dict[str, Statistics] = {}
    for number, batch in enumerate(walk.batches):
        inputs = _inputs_of(walk, names, batch, pause=pause)
        targets = {}
        if dense is not None:
            beside = dense.batches[number]
            targets = _inputs_of(dense, names, beside, pause=pause or last)
            if last:
                _leave(dense, beside)
        for name, x in inputs.items():
            if name not in sums:
                sums[name] = Statistics.empty(
                    x.shape[1],
                    targets[name].shape[1] if name in targets else None,
                    device=x.device,
                )
            sums[name].add(x, targets.get(name))
    for statistics in sums.values():
        statistics.complete()
    if dense is not None and last:
        dense.done = True
    return sums


def collect_relative(walk: Walk, names: list[str]) -> dict[str, Statistics]:
    """Run the data through a block, and weigh each token by 1 / |h|^2 with h what leaves the block.

    A layer that writes to the stream of hidden states then counts for what it changes of each
    token in proportion to that token's size, which is what the next norm makes of it. Blocks
    become comparable, and the few tokens with huge activations do not outweigh all others.

    Args:
        walk: the model.
        names: linear layers of the block.

    Returns:
        layer name -> statistics.
    """
    sums: dict[str, Statistics] = {}
    for batch in walk.batches:
        inputs: dict[str, Tensor] = {}
        with recorded(walk.block, names, inputs):
            hidden = batch.forward(walk.index, walk.block)
        weight = hidden.reshape(-1, hidden.shape[-1]).float().square().sum(dim=1, keepdim=True)
        for name, x in inputs.items():
            if name not in sums:
                sums[name] = Statistics.empty(x.shape[1], device=x.device)
            sums[name].add_weighted(x.float(), weight.clamp(min=1e-30).reciprocal())
    for statistics in sums.values():
        statistics.complete()
    return sums


def advance(walk: Walk) -> None:
    """Run the data through the block, or through the rest of it where passes wait, once."""
    if walk.done:
        return
    for batch in walk.batches:
        _leave(walk, batch)
    walk.done = True


def _leave(walk: Walk, batch: BlockInputs) -> None:
    """Take a batch through the block, or the rest of it."""
    batch.hidden = _pass(walk, batch).finish()
    batch.paused = None


def _inputs_of(
    walk: Walk, names: list[str], batch: BlockInputs, *, pause: bool
) -> dict[str, Tensor]:
    """[tokens, cols] for each name, in the dtype of the pass."""
    forward = _pass(walk, batch)
    inputs = forward.until(walk.block, names)
    batch.paused = forward if pause else None
    return inputs


def _pass(walk: Walk, batch: BlockInputs) -> Pass:
    """The pass that waits, or a new one."""
    return batch.paused or Pass(partial(batch.forward, walk.index, walk.block))
