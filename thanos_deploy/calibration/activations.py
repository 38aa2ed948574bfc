"""The calibration data between two blocks: on disk, and in memory where there is enough of it.

What enters a block is a safetensors file for each shard, and what leaves it the next ones. On disk
alone, memory holds a batch or two, however much calibration data there is; what fits is in the
system's page cache, from which reading it costs a copy. A GPU that has room for all of it is not
made to wait for that. The journal of a walk keeps the files as they are.
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

# Where the data between two blocks is held.
Place = Literal["auto", "device", "host", "disk"]

# Of a GPU's free memory, what "auto" takes at most.
_SHARE = 1 / 8

# Batches that may wait for being written while a GPU computes others.
_WAITING = 2


def holder(place: Place, device: torch.device, size: int) -> torch.device | None:
    """Where in memory the data is held; None for on disk alone.

    Args:
        place: what was asked for; "auto" is the memory of a GPU that has plenty, and else the disk.
        device: where blocks run.
        size: bytes of what enters a block and what leaves it together.
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
    """What enters the next block: one tensor for each batch of each model.

    They are kept in the dtype in which blocks run, or in that of the model's weights if it is
    smaller. All blocks, a walk's own and those of its rerun, see what was kept, rounding included.
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
            folder: for the files; what enters the block is there.
            index: number of the block; -1 for what lies before the first one, which nothing enters.
            kinds: dtype and shape of each tensor, in the order in which they are mostly read.
            forward: the dtype in which blocks run.
            device: where they run.
            held_on: keep it in the memory of this device as well; None for on disk alone.
            filed: write files; without them it must be held.
            shards: which tensors are this rank's, and in which shard each is; see `ShardFiles`.
                None for all of them, in one.
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
        """That of a tensor, which is not read for it."""
        return self._kinds[name][1]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a shape, as `read` would have it."""
        return torch.empty(shape, dtype=self._forward, device=self._device)

    def read(self, name: str) -> Tensor:
        """What enters the block, in the dtype in which blocks run."""
        if name in self._held_entering:
            return self._moved(self._held_entering[name])
        # Of a walk that goes on, what enters its first block is in the file alone.
        return self._moved(self._ahead.take(name, self._following.get(name)))

    def read_leaving(self, name: str) -> Tensor:
        """What has left the block, as `read` will have it."""
        if name in self._held_leaving:
            return self._moved(self._held_leaving[name])
        self._finish_writing()
        assert self._leaving is not None
        return self._moved(self._read(self._leaving, name))

    def write(self, name: str, hidden: Tensor) -> None:
        """Set what leaves the block.

        Raises:
            ModelError: a value does not fit the dtype.
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
        """Go on to the next block, which what left this one enters; return its files, if any."""
        self._finish_writing()
        self._ahead.forget()
        if self._entering is not None:
            self._entering.close()
        # Kept as long as the block might have had to be done again.
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
        """What enters the block, on the host."""
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

    What leaves a block is read as `left`, and becomes `hidden` when the activations advance.
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
        """Begin before the block at which the activations are.

        Args:
            activations: of all batches.
            name: of this batch's tensor.
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
            ModelError: a value does not fit the dtype in which the activations are kept.
        """
        self._activations.write(self._name, hidden)
