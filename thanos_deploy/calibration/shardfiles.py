"""Tensors in one file per shard, so that a run can resume with another number of ranks."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from thanos_deploy.model.tensorfile import Kind, TensorFile


class ShardFiles:
    """The files with the hidden states that enter one block, for this rank's shards.

    Attributes:
        files: one for each shard, in the order of the shards.
    """

    def __init__(self, files: Mapping[int, TensorFile]) -> None:
        self.files = list(files.values())
        self._owner = {name: file for file in self.files for name in file.kinds}

    @classmethod
    def create(
        cls, folder: Path, index: int, kinds: Mapping[str, Kind], shards: Mapping[str, int]
    ) -> "ShardFiles":
        """Create the files, and overwrite existing ones.

        Args:
            folder: where the files are.
            index: number of the block.
            kinds: maps the name of each tensor to its dtype and shape.
            shards: maps the name of each tensor that belongs to this rank to its shard.
        """
        return cls(
            {
                shard: TensorFile.create(
                    _path(folder, index, shard),
                    {name: kinds[name] for name, own in shards.items() if own == shard},
                )
                for shard in sorted(set(shards.values()))
            }
        )

    @classmethod
    def open(cls, folder: Path, index: int, shards: Mapping[str, int]) -> "ShardFiles":
        """Open the files for reading; see `create`."""
        numbers = sorted(set(shards.values()))
        return cls({shard: TensorFile.open(_path(folder, index, shard)) for shard in numbers})

    def read(self, name: str) -> Tensor:
        """See `TensorFile.read`."""
        return self._owner[name].read(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """See `TensorFile.write`."""
        self._owner[name].write(name, tensor)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def remove(folder: Path, index: int, shards: Mapping[str, int]) -> None:
    """Remove the files of a block, if they exist; for the arguments see `ShardFiles.create`."""
    for shard in set(shards.values()):
        _path(folder, index, shard).unlink(missing_ok=True)


def _path(folder: Path, index: int, shard: int) -> Path:
    return folder / f"inputs-{index:04d}-{shard:02d}.safetensors"
