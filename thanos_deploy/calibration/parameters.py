"""Load a walk's parameters from the checkpoint, and write them to its copy."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.rounding import rounded
from thanos_deploy.model.weights_copy import WeightsCopy


class ParameterFiles:
    """Moves parameters between a model without storage, its checkpoint, and the copy."""

    def __init__(self, checkpoint: Checkpoint, copy: WeightsCopy | None) -> None:
        """Begin before the first block.

        Args:
            checkpoint: the checkpoint to read.
            copy: the copy to write; None to write nothing.
        """
        self._checkpoint = checkpoint
        self._copy = copy

    def load(
        self, module: nn.Module, prefix: str, *, skip: str | None = None, dtype: torch.dtype | None
    ) -> None:
        """Give a module its weights, on the host.

        Args:
            module: the module.
            prefix: prefix of its parameters' full names.
            skip: full name of a submodule that gets no weights.
            dtype: see `read`.

        Raises:
            ModelError: see `read`.
        """
        module.load_state_dict(
            self.read(module, prefix, skip=skip, dtype=dtype), strict=False, assign=True
        )

    def read(
        self,
        module: nn.Module,
        prefix: str,
        *,
        skip: str | None = None,
        dtype: torch.dtype | None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """Read the weights of a module, by their names in the module.

        Args:
            module: the module.
            prefix: prefix of its parameters' full names.
            skip: full name of a submodule whose weights are left out.
            dtype: dtype of the result. None keeps the stored dtype of a weight that is written in
                the same one and has at most 32 bits, and makes the others float32.
            device: where to put the weights.

        Raises:
            ModelError: a tensor has NaN or infinite entries.
        """
        sources = {
            name: self._checkpoint.stored_name(prefix + name)
            for name, _ in module.named_parameters()
            if skip is None or not f"{prefix}{name}".startswith(f"{skip}.")
        }
        weights = self._checkpoint.weights
        return {
            name: weights.read([source], dtype or self._own_dtype(source), device)[source]
            for name, source in sources.items()
        }

    def dtypes(self, module: nn.Module, prefix: str) -> dict[str, torch.dtype]:
        """The dtype in which each parameter of a module will be written."""
        return {
            name: self._dtype(self._checkpoint.stored_name(prefix + name))
            for name, _ in module.named_parameters()
        }

    def finished(
        self, module: nn.Module, prefix: str, *, skip: Collection[str]
    ) -> dict[str, Tensor]:
        """Return a module's parameters on the host, as they will be written; none without a copy.

        Args:
            module: the module.
            prefix: prefix of its parameters' full names.
            skip: names of parameters, relative to the module, that are left to `copy_rest`.

        Returns:
            name in the checkpoint -> value.
        """
        if not self._writes:
            return {}
        return {
            target: rounded(parameter, self._dtype(target), target).cpu()
            for name, parameter in module.named_parameters()
            if name not in skip
            for target in [self._checkpoint.stored_name(prefix + name)]
        }

    def among(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Keep only the tensors whose names are those of parameters of the checkpoint."""
        return (one for one in tensors if one[0] in self._checkpoint.weights.shapes)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors under their names in the checkpoint."""
        if self._copy is not None and self._writes:
            for name, tensor in tensors:
                self._copy.write(name, tensor)

    def copy_rest(self) -> None:
        """Copy every tensor that has not been written yet from the checkpoint."""
        if self._copy is None:
            return
        for name in self._copy.missing:
            dtype = self._dtype(name)
            same = dtype == self._checkpoint.weights.dtypes[name]
            self._copy.write_pieces(
                name,
                (
                    (start, piece if same else rounded(piece, dtype, name))
                    for start, piece in self._checkpoint.weights.pieces(name)
                ),
            )

    @property
    def _writes(self) -> bool:
        return self._copy is not None and self._copy.writes

    def _own_dtype(self, name: str) -> torch.dtype:
        """The stored dtype if it is written in the same and has at most 32 bits; else float32."""
        dtype = self._dtype(name)
        same = dtype == self._checkpoint.weights.dtypes[name]
        return dtype if same and dtype.itemsize <= torch.float32.itemsize else torch.float32

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor will be written."""
        return (
            self._checkpoint.weights.dtypes[name] if self._copy is None else self._copy.dtype(name)
        )
