"""The calibration data between two blocks, on disk.

What enters a block is one safetensors file, and what leaves it the next. Memory holds one batch at
a time, however much calibration data there is; what fits is in the system's page cache, from
which reading it costs a copy. A GPU holds what passes it, and nothing else. The journal of a walk
keeps the files as they are.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.calibration.blocks import Arguments, BlockInputs
from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.tensorfile import Kind, TensorFile


class Activations:
    """What enters the next block: one tensor for each batch of each model.

    They are kept in the dtype in which blocks run, or in that of the model's weights if it is
    smaller. All blocks, a walk's own and those of its rerun, see what was read back, rounding
    included.
    """

    def __init__(
        self,
        folder: Path,
        index: int,
        kinds: Mapping[str, Kind],
        forward: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """Begin at a block.

        Args:
            folder: for the files; what enters the block is there.
            index: number of the block; -1 for what lies before the first one, which nothing enters.
            kinds: dtype and shape of each tensor.
            forward: the dtype in which blocks run.
            device: where they run.
        """
        self._device = device
        self._folder, self._index, self._kinds = folder, index, kinds
        self._forward = forward
        self._entering: TensorFile | None = None
        self._leaving: TensorFile | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor, which is not read for it."""
        return self._kinds[name][1]

    def read(self, name: str) -> Tensor:
        """What enters the block, in the dtype in which blocks run."""
        if self._entering is None:
            self._entering = TensorFile.open(self._path(self._index))
        return self._restored(self._entering, name)

    def read_leaving(self, name: str) -> Tensor:
        """What has left the block, as `read` will have it."""
        assert self._leaving is not None
        return self._restored(self._leaving, name)

    def write(self, name: str, hidden: Tensor) -> None:
        """Set what leaves the block.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        dtype, _ = self._kinds[name]
        rounded = hidden.to(dtype)
        if rounded is not hidden and not bool(rounded.isfinite().all()):
            raise ModelError(
                f"hidden states up to {hidden.abs().max().item():g} enter block {self._index + 1}, "
                f"more than the checkpoint's {dtype} holds",
                fix="the model overflows wherever it runs in that dtype; convert the checkpoint to "
                "bfloat16 or float32",
            )
        if self._leaving is None:
            self._leaving = TensorFile.create(self._path(self._index + 1), self._kinds)
        self._leaving.write(name, rounded)

    def advance(self) -> TensorFile:
        """Go on to the next block, which what left this one enters; return its file."""
        assert self._leaving is not None
        if self._entering is not None:
            self._entering.close()
        # Kept as long as the block might have had to be done again.
        self._path(self._index - 1).unlink(missing_ok=True)
        self._entering, self._leaving = self._leaving, None
        self._index += 1
        return self._entering

    def close(self) -> None:
        """Close the files."""
        for file in (self._entering, self._leaving):
            if file is not None:
                file.close()

    def _restored(self, file: TensorFile, name: str) -> Tensor:
        _, shape = self._kinds[name]
        return file.read(name).reshape(shape).to(self._device).to(self._forward)

    def _path(self, index: int) -> Path:
        return self._folder / f"inputs-{index:04d}.safetensors"


class StoredInputs(BlockInputs):
    """A batch of one model whose hidden states are in `Activations`.

    What leaves a block is read as `left`, and becomes `hidden` when the activations advance.
    """

    def __init__(self, activations: Activations, name: str, arguments: list[Arguments]) -> None:
        """Begin before the block at which the activations are.

        Args:
            activations: of all batches.
            name: of this batch's tensor.
            arguments: see `BlockInputs`.
        """
        super().__init__(arguments)
        self._activations, self._name = activations, name

    @property
    def hidden(self) -> Tensor:
        """See `BlockInputs.hidden`."""
        return self._activations.read(self._name)

    @property
    def left(self) -> Tensor:
        """See `BlockInputs.left`."""
        return self._activations.read_leaving(self._name)

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
