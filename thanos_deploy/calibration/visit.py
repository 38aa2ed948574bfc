"""One block on the walk through a model, to be changed in place, and where its time goes."""

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
        device: where the work is done, which is waited for.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device: torch.device = CPU

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time until the end of the `with` statement."""
        started = time.perf_counter()
        yield
        devices.wait(self.device)
        spent = time.perf_counter() - started
        self.seconds[activity] = self.seconds.get(activity, 0.0) + spent


@dataclass(frozen=True, slots=True)
class Visit:
    """One block on the walk, to be changed in place.

    Attributes:
        index: its number.
        structure: its linear layers.
        block: its weights: in float32 where it runs in that; else, as no value of theirs would be
            another one, in the dtype in which they are stored if that is also the one in which they
            will be written.
        walk: the calibration data that enters it, at a copy of the block if that runs in another
            dtype than these.
        dense: the same data in the dense model, at its own copy of the block; None if that was not
            asked for.
        dtypes: name of each of its parameters -> the dtype in which it will be written.
        can_wait: forward passes may wait inside the block; see `sizes.can_wait`.
        clock: where its time went; the walk adds "forward" and "journal" when it goes on to the
            next block.
        untouched: names of parameters that are to be written as they are in the checkpoint, to the
            last bit.
        tuned_in: what factors of products are rounded to while it is tuned; None for the dtype in
            which it runs.
        beside: tensors that the journal keeps with the block's parameters; on the host, by names
            that no parameter has.
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
        """What its parameters' full names begin with."""
        return self.structure.prefix

    @property
    def walks(self) -> list[Walk]:
        """The data on its ways through the block and, if it was asked for, the dense one."""
        return [self.walk] if self.dense is None else [self.walk, self.dense]

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.clock.device

    def write(self, linear: str, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Give a linear layer another matrix of the same shape, here and in the block that runs.

        Args:
            linear: its name, seen from the block.
            weight: [outputs, inputs], or some of its rows.
            rows: which.

        Returns:
            [outputs, inputs], the values that will be stored; a view of the layer's own rows.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        own = matrix(self.block.get_submodule(linear))[rows]
        own.copy_(self.stored(f"{linear}.weight", weight))
        if self.walk.block is not self.block:
            matrix(self.walk.block.get_submodule(linear))[rows].copy_(own)
        return own

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's new value as it will be written; see `rounding.rounded`.

        Raises:
            ModelError: a value does not fit the dtype.
        """
        return rounded(tensor, self.dtypes[name], self.prefix + name)
