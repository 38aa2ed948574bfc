"""Walk a checkpoint block by block with calibration data, one block's weights in memory at a time.

Each block sees the data as the blocks before it, changed or not, pass it on.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from thanos_deploy.calibrate import Walk, advance, block_inputs
from thanos_deploy.checkpoint import Checkpoint, WeightsCopy
from thanos_deploy.errors import ModelError

# Tokens per forward pass: enough to keep the cores busy, little enough to stay in their caches.
TOKENS_PER_BATCH = 2048


@dataclass(slots=True)
class Clock:
    """Seconds by activity."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time until the end of the `with` statement."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[activity] = self.seconds.get(activity, 0.0) + spent


@dataclass(frozen=True, slots=True)
class Visit:
    """One block on the walk, to be changed in place.

    Attributes:
        index: its number.
        prefix: what its parameters' full names begin with.
        block: its weights, in float32.
        walk: the calibration data that enters it.
        dense: the same data in the dense model, at its own copy of the block; None if that was not
            asked for.
        dtypes: name of each of its parameters -> the dtype in which it will be written.
        clock: where its time went; the walk adds "forward" when it goes on to the next block.
        untouched: names of parameters that are to be written as they are in the checkpoint, to the
            last bit.
    """

    index: int
    prefix: str
    block: nn.Module
    walk: Walk
    dense: Walk | None
    dtypes: dict[str, torch.dtype]
    clock: Clock
    untouched: set[str] = field(default_factory=set)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's new value as it will be written; see `stored`.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        return stored(tensor, self.dtypes[name], self.prefix + name)


@torch.no_grad()
def visits(
    checkpoint: Checkpoint,
    segments: Tensor,
    *,
    copy: WeightsCopy | None = None,
    with_dense: bool = False,
    forward: torch.dtype = torch.float32,
) -> Iterator[Visit]:
    """Visit every block in order; what is done to it counts for the blocks after it.

    Args:
        checkpoint: the model.
        segments: int64[count, length], calibration tokens.
        copy: where to write every block once it has been visited, and at the end all that lies
            outside the blocks, unchanged; None to write nothing.
        with_dense: run the data through the unchanged blocks as well.
        forward: see `calibrate.Walk.dtype`.

    Raises:
        ModelError: weights are missing, have NaN, or are not those that config.json describes.
    """
    family = checkpoint.family
    model = checkpoint.skeleton()
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    files = _Files(checkpoint, copy)
    files.load(model.base_model, f"{family.base}.", skip=family.blocks)
    batch = max(1, TOKENS_PER_BATCH // segments.shape[1])
    batches = block_inputs(model, family, torch.split(segments, batch))
    dense_batches = [replace(data) for data in batches] if with_dense else []
    model.get_input_embeddings().to("meta")
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}."
        files.load(block, prefix)
        visit = Visit(
            index=index,
            prefix=prefix,
            block=block,
            walk=Walk(index, block, batches, forward),
            dense=Walk(index, deepcopy(block), dense_batches, forward) if with_dense else None,
            dtypes=files.dtypes(block, prefix),
            clock=Clock(),
        )
        yield visit
        with visit.clock.measure("forward"):
            if index + 1 < len(blocks):
                for path in (visit.walk, visit.dense):
                    if path is not None:
                        advance(path)
        files.store(block, prefix, skip=visit.untouched)
        block.to("meta")
    files.copy_rest()


def stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as it is written: cast, and without -0.0.

    Kernels that compress 2:4 weights by their bit patterns take -0.0 for a value (vLLM pull
    request 13198), and a small negative weight can become one in the cast.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    cast = tensor.to(dtype, copy=True).add_(0.0)
    if not bool(cast.isfinite().all()):
        raise ModelError(
            f"{name}: values up to {tensor.abs().max().item():g} do not fit {dtype}",
            fix="use --dtype bf16 or fp32",
        )
    return cast


class _Files:
    """Moves parameters between a model without storage, its checkpoint, and the copy."""

    def __init__(self, checkpoint: Checkpoint, copy: WeightsCopy | None) -> None:
        self._checkpoint = checkpoint
        self._copy = copy

    def load(self, module: nn.Module, prefix: str, *, skip: str | None = None) -> None:
        """Give a module its weights, in float32; `skip` names a submodule, by its full name."""
        sources = {
            name: self._checkpoint.stored_name(prefix + name)
            for name, _ in module.named_parameters()
            if skip is None or not f"{prefix}{name}".startswith(f"{skip}.")
        }
        tensors = self._checkpoint.weights.read(sources.values())
        for name, source in sources.items():
            shape = tuple(module.get_parameter(name).shape)
            if tensors[source].shape != shape:
                raise ModelError(
                    f"{self._checkpoint.folder}: {source} has shape "
                    f"{tuple(tensors[source].shape)}, config.json says {shape}",
                    fix="use the config.json and the weights of the same checkpoint",
                )
        state = {name: tensors[source].float() for name, source in sources.items()}
        module.load_state_dict(state, strict=False, assign=True)

    def dtypes(self, module: nn.Module, prefix: str) -> dict[str, torch.dtype]:
        """The dtype in which each parameter of a module will be written."""
        dtype = (
            self._checkpoint.weights.dtypes.__getitem__ if self._copy is None else self._copy.dtype
        )
        return {
            name: dtype(self._checkpoint.stored_name(prefix + name))
            for name, _ in module.named_parameters()
        }

    def store(self, module: nn.Module, prefix: str, *, skip: Collection[str]) -> None:
        """Write the parameters of a module; those to `skip` are left to `copy_rest`."""
        if self._copy is None:
            return
        for name, parameter in module.named_parameters():
            if name in skip:
                continue
            target = self._checkpoint.stored_name(prefix + name)
            self._copy.write(target, stored(parameter, self._copy.dtype(target), target))

    def copy_rest(self) -> None:
        """Write what has not been written yet as it is in the checkpoint."""
        if self._copy is None:
            return
        for name in self._copy.missing:
            tensor = self._checkpoint.weights.read([name])[name]
            if tensor.dtype != self._copy.dtype(name):
                tensor = stored(tensor, self._copy.dtype(name), name)
            self._copy.write(name, tensor)
