"""Attention as ONNX Runtime's own operator, GroupQueryAttention.

The operator appends keys and values to the KV cache and attends in one step. Where past and present
are one buffer, it writes the new tokens into that buffer, so a step copies no cache. Every row of a
batch has its own length. The operator supports causal attention over all tokens or over a sliding
window, and heads that share keys (GQA); it applies rotary embeddings itself, from a table.

A model is run once before its graph is traced, to see whether the operator computes its attention.
If it does, the trace has the operator in place of the model's own attention.

Source: the schema of the operator in ONNX Runtime (com.microsoft). The behaviour of its CPU kernel
with rows of different lengths is pinned by `tests/exporters/onnx/test_attention.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from exporters.onnx import rotary
from exporters.onnx.rotary import Rotation, Tables
from thanos_deploy.model import rope

# Name under which transformers knows this implementation of attention.
NAME = "onnxruntime"

# The CPU kernel needs the channels of a head to be a multiple of this.
_CHANNELS = 8


class UnfitError(Exception):
    """The operator cannot compute the attention of a model; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the operator needs to know of a model beyond the arguments of one attention call.

    Attributes:
        windows: for each block, how many tokens a token sees, itself included; None for all.
        rotations: for each block, the rotary embedding that the operator applies; None where
            nothing is rotated, or where other nodes of the graph rotate.
        tables: cosines and sines that the rotations refer to.
    """

    windows: tuple[int | None, ...]
    rotations: tuple[Rotation | None, ...]
    tables: tuple[Tables, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The arguments of one attention call.

    Attributes:
        query: [batch, heads, sequence, dim].
        key, value: [batch, key-value heads, sequence, dim].
        mask: the object that `_Call.mask` returned.
        scale: factor on the products of queries and keys.
        softcap: cap on these products; None for no cap.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None


class _Call(Protocol):
    """Replaces masks and attention during one run of a model."""

    def mask(self, visible: Callable[..., Tensor]) -> Tensor | None:
        """Return the mask for one kind of attention.

        Args:
            visible: transformers' mask function: whether a query position sees a key position.
        """

    def attend(self, asked: Asked) -> Tensor:
        """Return the attention of the next block, [batch, sequence, heads, dim].

        Raises:
            UnfitError: the operator cannot compute this attention.
        """


_CALL: ContextVar[_Call] = ContextVar("attention")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers calls."""
    if s_aux is not None:
        raise UnfitError("its attention has attention sinks")
    scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
    asked = Asked(query, key, value, attention_mask, scale, softcap)
    return _CALL.get().attend(asked), None


def _mask(*, mask_function: Callable[..., Tensor], **_: Any) -> Tensor | None:
    return _CALL.get().mask(mask_function)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def implemented(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the `with` statement, the model uses the implementation of attention called `name`."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


@contextmanager
def _answered_by(call: _Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def plan(model: PreTrainedModel, positions: int) -> Plan:
    """Run a model once and plan how the operator computes its attention.

    Args:
        model: the model, in float32.
        positions: the longest sequence that the graph is meant for.

    Raises:
        UnfitError: the operator cannot compute the model's attention.
    """
    change = rope.change_of(model.config.to_dict())
    if change is not None and change.tokens < positions:
        raise UnfitError(
            f"its rotary embedding ({change.kind}) depends on the longest text in a batch"
        )
    ids = torch.zeros(1, 3, dtype=torch.long)
    survey = _Survey()
    with (
        torch.inference_mode(),
        rotary.without_dynamic_scaling(model),
        implemented(model, NAME),
        _answered_by(survey),
        rotary.watched(model, survey.rotations),
    ):
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(3)[None],
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        if len(survey.visible) != model.config.num_hidden_layers:
            raise UnfitError(
                "some of its blocks do not use the attention interface of transformers"
            )
        windows = tuple(_window(visible, positions) for visible in survey.visible)
        rotations, tables = rotary.tables_of(survey.before, positions)
    return Plan(windows, rotations, tables)


@dataclass(slots=True)
class _Survey:
    """Records the attention of a model, block by block; see `_Call`.

    Attributes:
        rotations: rotations made since the attention of the last block.
        before: for each block, the rotations made before its attention.
        visible: for each block, its mask function; see `_Call.mask`.
    """

    rotations: list[rotary.Seen] = field(default_factory=list)
    before: list[tuple[rotary.Seen, ...]] = field(default_factory=list)
    visible: list[Callable[..., Tensor]] = field(default_factory=list)
    _masks: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)

    def mask(self, visible: Callable[..., Tensor]) -> Tensor:
        """See `_Call.mask`; a new tensor, whose identity tells later which function it is for."""
        self._masks.append((torch.zeros(()), visible))
        return self._masks[-1][0]

    def attend(self, asked: Asked) -> Tensor:
        """See `_Call.attend`; returns zeros, since only the arguments matter."""
        query, key, value = asked.query, asked.key, asked.value
        dim = query.shape[3]
        if key.shape != value.shape or key.shape[3] != dim or query.shape[1] % key.shape[1]:
            raise UnfitError("its queries, keys and values have heads of different shapes")
        if dim % _CHANNELS:
            raise UnfitError(
                f"its heads have {dim} channels, which is not a multiple of {_CHANNELS}"
            )
        found = [visible for known, visible in self._masks if known is asked.mask]
        if not found:
            raise UnfitError("it computes its own attention masks")
        self.visible += found
        self.before.append(tuple(self.rotations))
        self.rotations.clear()
        return torch.zeros_like(query).transpose(1, 2)


def _window(visible: Callable[..., Tensor], positions: int) -> int | None:
    """How many tokens a token sees, itself included; None for all.

    Raises:
        UnfitError: a token sees other tokens than the most recent ones.
    """
    zero, others = torch.tensor(0), torch.arange(positions)
    size = int(visible(zero, zero, torch.tensor(positions - 1), others).sum())
    for place in {0, size - 1, min(size, positions - 1), positions - 1}:
        seen = visible(zero, zero, torch.tensor(place), others)
        if not torch.equal(seen, (others <= place) & (others > place - size)):
            raise UnfitError("its attention mask is neither causal nor a causal sliding window")
    return None if size == positions else size


class WithCacheInPlace(nn.Module):
    """A causal model whose attention is the operator; has the signature of `trace.WithFlatCache`.

    Padding is on the right of a row, and the mask has as many ones as the row has tokens.
    """

    def __init__(self, model: PreTrainedModel, made: Plan, *, logits: str) -> None:
        """Wrap a model that uses this implementation of attention.

        Args:
            model: the model.
            made: the plan of the model.
            logits: "all", or "last" for only the logits after the last token of each row.
        """
        super().__init__()
        self.model = model
        self._plan = made
        self._only_last = logits == "last"
        for index, tables in enumerate(made.tables):
            for part, table in zip(rotary.PARTS, tables, strict=True):
                self.register_buffer(rotary.name(index, part), table, persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits, then keys and values of every block, past tokens included."""
        last = attention_mask.sum(dim=1) - 1
        call = _Traced(
            self._plan,
            past,
            last.to(torch.int32),
            torch.full((1,), attention_mask.shape[1], dtype=torch.int32),
            [
                tuple(getattr(self, rotary.name(index, part)) for part in rotary.PARTS)
                for index in range(len(self._plan.tables))
            ],
        )
        cache = DynamicCache()
        cache.layers = [_Past(*pair) for pair in zip(past[::2], past[1::2], strict=True)]
        with ExitStack() as stack:
            stack.enter_context(_answered_by(call))
            if any(self._plan.rotations):
                stack.enter_context(rotary.left_out(self.model))
            if self._only_last:
                stack.enter_context(_head_reads(self.model, last - position_ids[:, 0]))
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        return (output.logits, *call.present)


class _Past(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """The cache of one block; it does not append, because the operator does."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values unchanged."""
        return key_states, value_states


@dataclass(slots=True)
class _Traced:
    """Puts the operator in place of attention during a trace; see `_Call`.

    Attributes:
        plan: the plan of the model.
        past: the cache before the step: key 0, value 0, key 1, ...
        last: int32[batch], the number of tokens of each row, less one.
        total: int32[1], the length of the attention mask.
        tables: tables of the plan, as buffers of the traced module.
        present: the cache after the step, in the order of `past`; grows with every block.
    """

    plan: Plan
    past: Sequence[Tensor]
    last: Tensor
    total: Tensor
    tables: Sequence[tuple[Tensor, ...]]
    present: list[Tensor] = field(default_factory=list)

    def mask(self, visible: Callable[..., Tensor]) -> None:
        """See `_Call.mask`; the operator needs none."""

    def attend(self, asked: Asked) -> Tensor:
        """See `_Call.attend`."""
        block = len(self.present) // 2
        batch, heads, sequence, dim = asked.query.shape
        rotation, window = self.plan.rotations[block], self.plan.windows[block]
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": asked.key.shape[1],
            "scale": asked.scale,
        }
        if window is not None:
            attributes["local_window_size"] = window
        if asked.softcap is not None:
            attributes["softcap"] = float(asked.softcap)
        if rotation is not None:
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(rotation.interleaved)}
        past = self.past[2 * block : 2 * block + 2]
        output, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [
                *(_flat(tensor) for tensor in (asked.query, asked.key, asked.value)),
                *past,
                self.last,
                self.total,
                *(() if rotation is None else self.tables[rotation.table]),
            ],
            attributes,
            dtypes=[asked.query.dtype] * 3,
            shapes=[
                (batch, sequence, heads * dim),
                *((*one.shape[:2], one.shape[2] + sequence, one.shape[3]) for one in past),
            ],
            version=1,
        )
        self.present += present
        return output.reshape(batch, sequence, heads, dim)


def _flat(tensor: Tensor) -> Tensor:
    """Reshape [batch, heads, sequence, dim] to [batch, sequence, heads * dim]."""
    batch, heads, sequence, dim = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, sequence, heads * dim)


@contextmanager
def _head_reads(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Within the `with` statement, the output head reads one token of each row.

    Args:
        model: the model.
        places: int64[batch], the index of that token in the new tokens of its row.
    """

    def gather(_: nn.Module, given: tuple[Tensor]) -> Tensor:
        (hidden,) = given
        return hidden.gather(1, places[:, None, None].expand(-1, 1, hidden.shape[2]))

    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
