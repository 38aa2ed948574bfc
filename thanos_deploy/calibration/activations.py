"""The hidden states of the calibration data between two blocks, on disk or in memory.

The hidden states that enter a block are stored in one safetensors file per shard, and so are those
that leave it. If they are on disk alone, memory holds one or two batches, however much calibration
data there is: the operating system keeps what fits in its page cache, and a read from there costs a
copy. A GPU with enough free memory holds all of them and avoids that wait. The journal of a walk
keeps the files as they are.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from thanos_deploy.calibration.blocks import Arguments, BlockInputs
from thanos_deploy.calibration.shardfiles import ShardFiles, remove
from thanos_deploy.errors import ModelError
from thanos_deploy.machine import devices
from thanos_deploy.machine.background import Ahead, Background
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.tensorfile import Kind, TensorFile

# Where the hidden states between two blocks are held.
Place = Literal["auto", "device", "host", "disk"]

# The largest fraction of a GPU's free memory that "auto" uses.
_SHARE = 1 / 8

# Number of batches that may be queued for writing while a GPU computes the next ones.
_WAITING = 2


def memory_for(place: Place, device: torch.device, size: int) -> torch.device | None:
    """Return the device whose memory holds the hidden states, or None to keep them on disk only.

    Args:
        place: the requested place; "auto" is the GPU if its free memory is large enough, and the
            disk otherwise.
        device: where blocks run.
        size: bytes of the hidden states that enter a block plus those that leave it.
    """
    match place:
        case "device":
            return device
        case "host":
            return CPU
        case "disk":
            return None
    return device if device.type == "cuda" and size <= _SHARE * devices.free_bytes(device) else None


class Activations:
    """The hidden states that enter the next block: one tensor for each batch of each model.

    They are stored in the dtype in which blocks run, or in the dtype of the model's weights if that
    is smaller. Every block reads the stored, rounded values, whether they come from memory or from
    a file, so a resumed walk sees the same numbers as an uninterrupted one.
    """

    def __init__(
        self,
        folder: Path,
        index: int,
        kinds: Mapping[str, Kind],
        forward: torch.dtype,
        device: torch.device = CPU,
        *,
        held_on: torch.device | None = None,
        filed: bool = True,
        shards: Mapping[str, int] | None = None,
    ) -> None:
        """Begin at a block.

        Args:
            folder: where the files are; those with the inputs of the block are there already.
            index: number of the block; -1 for the embeddings, which come before the first block and
                read no hidden states.
            kinds: dtype and shape of each tensor, in the order in which they are mostly read.
            forward: the dtype in which blocks run.
            device: where blocks run.
            held_on: device whose memory holds the hidden states as well; None for disk only.
            filed: whether to write files; if not, `held_on` must be set.
            shards: maps the name of each tensor that belongs to this rank to its shard; see
                `ShardFiles`. None if all tensors belong to this rank, in one shard.
        """
        assert filed or held_on is not None
        self._device, self._held_on, self._filed = device, held_on, filed
        self._folder, self._index, self._kinds = folder, index, kinds
        self._forward = forward
        self._shards = dict.fromkeys(kinds, 0) if shards is None else shards
        self._entering: ShardFiles | None = None
        self._leaving: ShardFiles | None = None
        self._held_entering: dict[str, Tensor] = {}
        self._held_leaving: dict[str, Tensor] = {}
        self._background = Background(device)
        self._ahead = Ahead(self._from_file, self._background)
        self._following = dict(pairwise(self._shards))
        self._writing: deque[Future[None]] = deque()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._kinds[name][1]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor, with the dtype and device of what `read` returns."""
        return torch.empty(shape, dtype=self._forward, device=self._device)

    def read(self, name: str) -> Tensor:
        """Return a batch's hidden states that enter the block, in the dtype in which blocks run."""
        if name in self._held_entering:
            return self._moved(self._held_entering[name])
        # When a walk resumes, the inputs of its first block are in the files only.
        return self._moved(self._ahead.take(name, self._following.get(name)))

    def read_leaving(self, name: str) -> Tensor:
        """Return the hidden states of a batch that have left the block, as `read` will later."""
        if name in self._held_leaving:
            return self._moved(self._held_leaving[name])
        self._finish_writing()
        assert self._leaving is not None
        return self._moved(self._read(self._leaving, name))

    def write(self, name: str, hidden: Tensor) -> None:
        """Store the hidden states of a batch that leave the block.

        Raises:
            ModelError: a value does not fit the dtype in which the hidden states are stored.
        """
        dtype, _ = self._kinds[name]
        rounded = hidden.detach().to(dtype)
        if rounded.dtype is not hidden.dtype and not bool(rounded.isfinite().all()):
            raise ModelError(
                f"hidden states up to {hidden.abs().max().item():g} enter block {self._index + 1}, "
                f"more than the checkpoint's {dtype} holds",
                fix="the model overflows wherever it runs in that dtype; convert the checkpoint to "
                "bfloat16 or float32",
            )
        if self._held_on is not None:
            rounded = self._held_leaving[name] = rounded.to(self._held_on)
        if self._filed:
            if self._leaving is None:
                self._leaving = ShardFiles.create(
                    self._folder, self._index + 1, self._kinds, self._shards
                )
            self._writing.append(
                self._background.start(partial(self._leaving.write, name, rounded))
            )
            if len(self._writing) > _WAITING:
                self._writing.popleft().result()

    def advance(self) -> list[TensorFile]:
        """Go on to the next block: the outputs of this one become its inputs.

        Returns:
            the files with the inputs of the next block; none if no files are written.
        """
        self._finish_writing()
        self._ahead.forget()
        if self._entering is not None:
            self._entering.close()
        # The inputs of the previous block, which will not be processed again now.
        remove(self._folder, self._index - 1, self._shards)
        self._entering, self._leaving = self._leaving, None
        self._held_entering, self._held_leaving = self._held_leaving, {}
        self._index += 1
        return [] if self._entering is None else self._entering.files

    def close(self) -> None:
        """Close the files."""
        self._background.close()
        for file in (self._entering, self._leaving):
            if file is not None:
                file.close()

    def _from_file(self, name: str) -> Tensor:
        """Read the hidden states that enter the block from their file, on the host."""
        if self._entering is None:
            self._entering = ShardFiles.open(self._folder, self._index, self._shards)
        return self._read(self._entering, name)

    def _read(self, files: ShardFiles, name: str) -> Tensor:
        tensor = files.read(name).reshape(self.shape(name))
        return tensor.pin_memory() if self._background.parallel else tensor

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True).to(self._forward)

    def _finish_writing(self) -> None:
        while self._writing:
            self._writing.popleft().result()


class StoredInputs(BlockInputs):
    """A batch of one model whose hidden states are in `Activations`.

    The output of a block is read as `left`, and becomes `hidden` when the activations advance.
    """

    def __init__(
        self,
        activations: Activations,
        name: str,
        arguments: list[Arguments],
        shard: int = 0,
        *,
        counted: bool = True,
        products: torch.dtype | None = None,
    ) -> None:
        """Begin before the current block of the activations.

        Args:
            activations: the hidden states of all batches.
            name: name of this batch's tensor in `activations`.
            arguments, shard, counted, products: see `BlockInputs`.
        """
        super().__init__(arguments, shard, counted=counted, products=products)
        self._activations, self._name = activations, name

    @property
    def hidden(self) -> Tensor:
        """See `BlockInputs.hidden`."""
        return self._activations.read(self._name)

    @property
    def left(self) -> Tensor:
        """See `BlockInputs.left`."""
        return self._activations.read_leaving(self._name)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `BlockInputs.empty`."""
        return self._activations.empty(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `BlockInputs.shape`."""
        return self._activations.shape(self._name)

    def leave(self, hidden: Tensor) -> None:
        """See `BlockInputs.leave`.

        Raises:
            ModelError: a value does not fit the dtype in which the hidden states are stored.
        """
        self._activations.write(self._name, hidden)
