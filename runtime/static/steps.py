"""Prefill and decode steps of a causal model on a static KV cache, recorded and replayed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.static import attention, memory
from runtime.static.cache import block_shapes
from runtime.static.places import Places, needed_bytes
from runtime.static.replay import Eager, Recording, Replay
from runtime.static.room import Room
from thanos_deploy.model.rope import depends_on_length

# Most prompt shapes that are recorded; these are the first ones that repeat. A recording holds
# memory, and replacing old recordings by new ones would cost the time of some prefills each time.
_MOST_PROMPTS = 4


class StaticSteps:
    """Steps of a causal model, on a KV cache whose tensors never move.

    Before a step, its inputs are copied from the host into tensors at fixed addresses. A step that
    runs twice leaves the same state as a step that runs once, so it may run again to be recorded.

    Attributes:
        length: number of tokens of each sequence in the cache, padding included.
    """

    def __init__(
        self,
        model: Any,
        room: Room,
        *,
        recording: Callable[[Any], Recording] | None = None,
    ) -> None:
        """Find the cache shapes of the model's blocks, and allocate the cache.

        Args:
            model: a causal model of transformers, on the device where it is to run.
            room: capacity of the cache, which grows when more is needed.
            recording: makes an empty recording from a memory pool. None for CUDA graphs on a GPU,
                unless the model's rotary embedding rules them out, and for eager steps elsewhere.

        Raises:
            ResourceError: the GPU has too little memory.
        """
        attention.use(model)
        self._model = model
        self._device: torch.device = model.device
        self._vocabulary: int = model.config.vocab_size
        self._most_tokens: int = model.config.max_position_embeddings
        on_gpu = self._device.type == "cuda"
        self._recording = recording or (Replay if on_gpu and _is_recordable(model) else Eager)
        self._prompts_seen: set[tuple[int, int]] = set()
        self._shapes = block_shapes(model)
        self._batch = 0
        self.length = 0
        self._places: Places | None = self._allocate(room)

    @property
    def room(self) -> Room:
        """The present capacity of the cache."""
        return self._open_places.room

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> Tensor:
        """Forget all sequences, and read a batch of prompts.

        Args:
            ids: [batch, tokens].
            mask: [batch, tokens], 0 for padding on the left; None if there is none.

        Returns:
            Logits after the last token of each prompt, float32[batch, vocabulary] on the device;
            the next step overwrites them.

        Raises:
            ResourceError: the GPU has too little memory.
        """
        batch, tokens = ids.shape
        self._make_room(Room(batch, min(tokens + 1, self._most_tokens)))
        self._batch, self.length = batch, tokens
        places = self._open_places
        places.prompt[: ids.size] = torch.tensor(ids.reshape(-1))
        seen = places.mask[:batch, :tokens]
        seen[:] = True if mask is None else torch.tensor(mask, dtype=torch.bool)
        places.gaps[:batch] = tokens - seen.sum(dim=1, keepdim=True)
        step = partial(self._prefill_step, batch, tokens, is_padded=mask is not None)
        if mask is None and self._repeats(batch, tokens):
            self._replay(("prefill", batch, tokens), step)
        else:  # with padding, transformers reads values of the mask on the host
            with self._memory(f"reading {batch} prompts of {tokens} tokens", self.room):
                step()
        return places.logits[:batch]

    def decode(self, ids: NDArray[np.int64]) -> Tensor:
        """Append one token to every sequence.

        Args:
            ids: [batch].

        Returns:
            Logits after the new tokens, float32[batch, vocabulary] on the device; the next step
            overwrites them.

        Raises:
            ResourceError: the GPU has too little memory.
        """
        batch = self._batch
        self._grow(Room(batch, self.length + 1))
        places = self._open_places
        # Nothing waits for this copy: whoever calls must read the logits on the host before the
        # next step writes other ids.
        places.staged[:batch] = torch.tensor(ids)
        places.staged[-1] = self.length
        places.inputs.copy_(places.staged, non_blocking=True)
        self.length += 1
        reach = self.room.reach(self.length)
        self._replay(("decode", batch, reach), partial(self._decode_step, batch, reach))
        return places.logits[:batch]

    def _prefill_step(self, batch: int, tokens: int, *, is_padded: bool) -> None:
        places = self._open_places
        mask = places.mask[:batch, :tokens] if is_padded else None
        if mask is None:
            positions = torch.arange(tokens, device=self._device).expand(batch, -1)
        else:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        places.cache.read_prompt()
        self._forward(places.prompt[: batch * tokens].view(batch, tokens), mask, positions)

    def _decode_step(self, batch: int, reach: int) -> None:
        places = self._open_places
        index = places.inputs[-1]
        places.mask.index_fill_(1, index[None], True)
        places.cache.append(reach)
        self._forward(
            places.inputs[:batch, None], places.mask[:batch, :reach], index - places.gaps[:batch]
        )

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        places = self._open_places
        with torch.inference_mode():
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=places.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            places.logits[: len(ids)].copy_(output.logits[:, -1])

    def _replay(self, key: tuple[str, int, int], step: Callable[[], None]) -> None:
        places = self._open_places
        if key not in places.recorded:
            kind, batch, tokens = key
            recording = self._recording(places.pool)
            what = f"recording a {kind} step for {batch} sequences of {tokens} tokens"
            with self._memory(what, self.room):
                recording.capture(step)
            places.recorded[key] = recording
        places.recorded[key].replay()

    def _repeats(self, batch: int, tokens: int) -> bool:
        """Whether to record prompts of this shape: if it was seen before, for a few shapes."""
        shape, recorded = (batch, tokens), self._open_places.recorded
        if ("prefill", *shape) in recorded:
            return True
        is_new = shape not in self._prompts_seen
        self._prompts_seen.add(shape)
        return not is_new and sum(kind == "prefill" for kind, *_ in recorded) < _MOST_PROMPTS

    @property
    def _open_places(self) -> Places:
        assert self._places is not None  # None after a prefill that ran out of memory
        return self._places

    def _make_room(self, needed: Room) -> None:
        """Allocate a larger cache if needed; the old one is freed first, with its sequences."""
        room = Room(0, 0) if self._places is None else self._places.room
        if not room.holds(needed):
            self._places = None
            self._places = self._allocate(room.grown(needed, most_tokens=self._most_tokens))

    def _grow(self, needed: Room) -> None:
        """Allocate a larger cache if needed, and copy the sequences into it."""
        if not self.room.holds(needed):
            larger = self._allocate(self.room.grown(needed, most_tokens=self._most_tokens))
            larger.copy_from(self._open_places)
            self._places = larger

    def _allocate(self, room: Room) -> Places:
        what = f"allocating a KV cache for {room.batch} sequences of {room.tokens} tokens"
        with self._memory(what, room):
            return Places(self._shapes, room, vocabulary=self._vocabulary, device=self._device)

    def _memory(self, what: str, room: Room) -> AbstractContextManager[None]:
        size = needed_bytes(self._shapes, room, vocabulary=self._vocabulary)
        return memory.needed(f"{what}, with {size} bytes for the KV cache and the logits")


def _is_recordable(model: Any) -> bool:
    """Whether the steps of a model can be recorded: the host reads no values within them."""
    # If the rotary frequencies depend on the longest position, the host reads it in every step.
    return not depends_on_length(getattr(model.config, "rope_parameters", None) or {})
