"""One block during a walk through a model, to be changed in place, and the time spent on it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thanos_deploy.calibration.collect import Walk
from thanos_deploy.machine import devices
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.rounding import rounded
from thanos_deploy.model.structure import BlockStructure


@dataclass(slots=True)
class Clock:
    """Seconds by activity.

    Attributes:
        seconds: activity -> seconds.
        device: where the work runs; `measure` synchronises with it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device: torch.device = CPU

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time of the body of the `with` statement to an activity."""
        started = time.perf_counter()
        yield
        devices.wait(self.device)
        spent = time.perf_counter() - started
        self.seconds[activity] = self.seconds.get(activity, 0.0) + spent


@dataclass(frozen=True, slots=True)
class Visit:
    """One block during a walk, to be changed in place.

    Attributes:
        index: number of the block.
        structure: its linear layers.
        block: the block, with its weights. They are float32 if blocks run in float32. Otherwise a
            weight keeps its stored dtype if it will be written in the same one, which loses
            nothing, and is float32 if not.
        walk: the calibration data at this block; its `block` is a copy in the dtype in which blocks
            run, if that differs from the dtype of any weight.
        dense: the same data in the dense model, with its own copy of the block; None if it was not
            requested.
        dtypes: maps the name of each parameter to the dtype in which it will be written.
        can_wait: whether forward passes may wait inside the block; see `sizes.can_wait`.
        clock: time by activity; the walk adds "forward" and "journal" when it goes on to the next
            block.
        untouched: names of parameters to copy from the checkpoint bit by bit.
        tuned_in: dtype to which the factors of matrix products are rounded while the block is
            tuned; None for the dtype in which it runs.
        beside: further tensors for the journal to keep with the block's parameters; on the host,
            under names that no parameter has.
    """

    index: int
    structure: BlockStructure
    block: nn.Module
    walk: Walk
    dense: Walk | None
    dtypes: dict[str, torch.dtype]
    can_wait: bool
    clock: Clock
    untouched: set[str] = field(default_factory=set)
    tuned_in: torch.dtype | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Prefix of the full names of the block's parameters."""
        return self.structure.prefix

    @property
    def walks(self) -> list[Walk]:
        """The walk of the pruned model and, if there is one, that of the dense model."""
        return [self.walk] if self.dense is None else [self.walk, self.dense]

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.clock.device

    def write(self, linear: str, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Replace the weight of a linear layer, here and in the block that runs.

        Args:
            linear: name of the layer, relative to the block.
            weight: [outputs, inputs] of the same shape as before, or some of its rows.
            rows: which rows `weight` has.

        Returns:
            [outputs, inputs], these rows as they will be stored; a view of the layer's weight.

        Raises:
            ModelError: a value does not fit the dtype in which the weight is stored.
        """
        own = matrix(self.block.get_submodule(linear))[rows]
        own.copy_(self.stored(f"{linear}.weight", weight))
        if self.walk.block is not self.block:
            matrix(self.walk.block.get_submodule(linear))[rows].copy_(own)
        return own

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Round a parameter's new value to the dtype in which it is written; see `rounded`.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        return rounded(tensor, self.dtypes[name], self.prefix + name)
