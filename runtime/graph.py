"""A graph that `exporters.onnx` wrote, in a session of ONNX Runtime."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime import floats
from runtime.engine import Ids, Logits, require_readable, require_room
from runtime.floats import Float
from runtime.memory import Memory, Tensor
from thanos_deploy.errors import InputError
from thanos_deploy.model.rope import Change

# Tokens of a text that `Graph.read` reads at once: each has logits of the vocabulary's size.
_TOKENS_AT_ONCE = 256

# The metadata entry that says which operators a graph has; see `exporters.onnx.graph`.
_GRAPH = "thanos_deploy.graph"

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"


class Graph:
    """A session that takes tokens and a KV cache, and gives logits and the longer cache.

    A cache is a list of `memory.Tensor`, one for each input `past_key_values.*`, and stays on the
    session's device: the outputs of one run are the inputs of the next. Only the logits that the
    caller needs are copied to the host.

    Attributes:
        max_sequence: largest number of tokens, prompt and answer together.
        vocabulary: number of token ids.
        logits: "all" or "last", the tokens whose logits the graph gives; see `exporters.onnx`.
        memory: memory of the session's device.
        change: the length beyond which a row depends on the longest row of the batch, None if there
            is none; see `thanos_deploy.model.rope`.
        in_place: the graph has ONNX Runtime's own attention: padding is on the right of a row, and
            `append` writes the cache in place.
    """

    def __init__(
        self,
        session: Any,
        ort: Any,
        *,
        memory: Memory,
        max_sequence: int,
        change: Change | None = None,
    ) -> None:
        """Wrap a session.

        Args:
            session: an `onnxruntime.InferenceSession`.
            ort: the module `onnxruntime`.
            memory: memory of the device that the session runs on.
            max_sequence: largest number of tokens, prompt and answer together.
            change: the length beyond which a row depends on the longest row of the batch; None if
                there is none.

        Raises:
            InputError: the cache or the logits have a type that is not supported.
        """
        self._session = session
        self._ort = ort
        self.memory = memory
        self.max_sequence = max_sequence
        self.change = change
        logits, *present = session.get_outputs()
        self._present = [value.name for value in present]
        self._past = session.get_inputs()[len(TOKEN_INPUTS) :]
        self._types = [floats.named(entry.type, tensor=entry.name) for entry in self._past]
        self._logits_type = floats.named(logits.type, tensor=logits.name)
        self.logits = "last" if logits.shape[1] == 1 else "all"
        self.vocabulary: int = logits.shape[2]
        described = session.get_modelmeta().custom_metadata_map
        self.in_place: bool = described.get(_GRAPH) == "ort"

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Return the cache of sequences without tokens: tensors [batch, heads, 0, dim]."""
        return [
            replace(
                self.memory.allocate(0, type_), shape=(batch, entry.shape[1], 0, entry.shape[3])
            )
            for entry, type_ in zip(self._past, self._types, strict=True)
        ]

    def run(
        self,
        ids: Ids,
        mask: Ids,
        cache: Sequence[Tensor],
        *,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Logits, Sequence[Tensor]]:
        """Append tokens to every sequence.

        Args:
            ids: int64[batch, tokens].
            mask: int64[batch, past + tokens], 0 for padding, which must be on the left.
            cache: the KV cache of the past.
            into: where to write the longer cache; None for memory that the session allocates.

        Returns:
            float32[batch, vocabulary], the logits after the last token, and the longer cache.

        Raises:
            InputError: a row would depend on the longest one; see `rope.Change.require_alike`.
        """
        if self.change is not None:
            self.change.require_alike(mask.sum(axis=1))
        logits, longer = self._append(ids, mask, cache, into)
        return self._rows(logits, tokens=1), longer

    def bind(self, cache: Sequence[Tensor]) -> "Binding":
        """Bind buffers that are both past and present in the runs of an in-place graph.

        Args:
            cache: the buffers, each [batch, heads, room, dim].
        """
        binding = self._session.io_binding()
        for entry, present, tensor in zip(self._past, self._present, cache, strict=True):
            place = (self.memory.device, 0, tensor.type.onnx, tensor.shape, tensor.address)
            binding.bind_input(entry.name, *place)
            binding.bind_output(present, *place)
        return Binding(binding, cache)

    def append(self, bound: "Binding", ids: Ids, before: Ids, after: Ids) -> Logits:
        """Append tokens to every sequence, in place.

        Args:
            bound: the cache. If more than one token is appended to a sequence, it must be the cache
                of a single sequence, or of sequences that have no tokens yet.
            ids: int64[batch, tokens], with padding on the right.
            before, after: int64[batch], length of each sequence before and after this call, without
                padding.

        Returns:
            float32[batch, vocabulary], the logits after the last token of each.
        """
        total = int(after.max())
        mask = (np.arange(total) < after[:, None]).astype(np.int64)
        positions = before[:, None] + np.arange(ids.shape[1])
        self._bind_tokens(bound.binding, ids, mask, positions)
        batch, given = len(ids), 1 if self.logits == "last" else ids.shape[1]
        flat = self.memory.allocate(batch * given * self.vocabulary, self._logits_type)
        logits = replace(flat, shape=(batch, 1, given, self.vocabulary))
        bound.binding.bind_output(
            LOGITS,
            self.memory.device,
            0,
            logits.type.onnx,
            (batch, given, self.vocabulary),
            logits.address,
        )
        self._run(bound.binding)
        if given == 1:
            lines = [logits.lines(range(batch), range(1))]
        else:
            last = (after - before - 1).tolist()
            lines = [
                logits.lines(range(row, row + 1), range(place, place + 1))
                for row, place in enumerate(last)
            ]
        raw = np.concatenate(list(map(self.memory.read, lines)))
        return logits.type.widen(raw.view(logits.type.bits))

    def read(self, ids: Ids) -> Iterator[Logits]:
        """Yield the logits after every token of one text, which is read in parts (chunked prefill).

        Args:
            ids: int64[tokens].

        Yields:
            float32[part, vocabulary], the logits after every token, in order.

        Raises:
            InputError: the graph gives the logits after the last token only.
            UsageError: there is no token, an id is outside the vocabulary, or there are more tokens
                than the export is made for.
        """
        require_all_logits(self.logits)
        require_readable(ids[None], self.vocabulary)
        self.require_room(len(ids))
        cache: Sequence[Tensor] = self.empty_cache(1)
        # If the rotary frequencies depend on the length of the text, it is read in a single part.
        whole = self.change is not None and len(ids) > self.change.tokens
        at_once = len(ids) if whole else _TOKENS_AT_ONCE
        for start in range(0, len(ids), at_once):
            part = ids[None, start : start + at_once]
            mask = np.ones((1, start + part.shape[1]), dtype=np.int64)
            logits, cache = self._append(part, mask, cache, None)
            yield self._rows(logits, tokens=part.shape[1])

    def _append(
        self, ids: Ids, mask: Ids, cache: Sequence[Tensor], into: Sequence[Tensor] | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Like `run`, but unchecked, and return all logits of the graph, on the device."""
        device = self.memory.device
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        binding = self._session.io_binding()
        self._bind_tokens(binding, ids, mask, positions)
        for entry, past in zip(self._past, cache, strict=True):
            binding.bind_input(entry.name, device, 0, past.type.onnx, past.shape, past.address)
        binding.bind_output(LOGITS, device)
        for index, name in enumerate(self._present):
            if into is None:
                binding.bind_output(name, device)
            else:
                room = into[index]
                binding.bind_output(name, device, 0, room.type.onnx, room.shape, room.address)
        self._run(binding)
        logits, *longer = binding.get_outputs()
        if into is None:
            into = [_tensor(value, its) for value, its in zip(longer, self._types, strict=True)]
        return _tensor(logits, self._logits_type), into

    def _bind_tokens(self, binding: Any, *arrays: Ids) -> None:
        """Bind the arrays to `TOKEN_INPUTS`, in this order."""
        for name, array in zip(TOKEN_INPUTS, arrays, strict=True):
            value = self._ort.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(array), self.memory.device
            )
            binding.bind_ortvalue_input(name, value)

    def _run(self, binding: Any) -> None:
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _rows(self, logits: Tensor, *, tokens: int) -> Logits:
        """Copy the logits after the last tokens of every sequence to the host.

        Returns:
            float32[batch * tokens, vocabulary].
        """
        batch, given, vocabulary = logits.shape
        each = replace(logits, shape=(batch, 1, given, vocabulary))
        raw = self.memory.read(each.lines(range(batch), range(given - tokens, given)))
        return logits.type.widen(raw.view(logits.type.bits).reshape(-1, vocabulary))

    def require_room(self, tokens: int) -> None:
        """Refuse sequences that are longer than the export is made for.

        Raises:
            UsageError: there are more tokens than `max_sequence`.
        """
        require_room(
            tokens,
            self.max_sequence,
            taker="the export is made for",
            fix="use a shorter prompt or fewer new tokens, or export with a larger --max-seq",
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """A KV cache that the runs of a graph read and write in place.

    Attributes:
        binding: an `onnxruntime.IOBinding`.
        cache: the tensors that are bound, kept alive as long as the binding.
    """

    binding: Any
    cache: Sequence[Tensor]


def _tensor(value: Any, type_: Float) -> Tensor:
    """Describe a result of ONNX Runtime, which owns the memory."""
    return Tensor(value.data_ptr(), tuple(value.shape()), type_, value)


def require_all_logits(logits: str) -> None:
    """Refuse a graph that does not give the logits after every token of a text.

    Args:
        logits: "all" or "last", the tokens whose logits the graph gives.

    Raises:
        InputError: the graph gives the logits after the last token only.
    """
    if logits != "all":
        raise InputError(
            f"the graph was exported with --logits {logits}, and measuring quality needs "
            "the logits after every token",
            fix="run `thanos-deploy export OUT --target onnx --logits all --overwrite` first",
        )
