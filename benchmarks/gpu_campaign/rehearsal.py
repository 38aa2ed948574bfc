"""Doing a step on a CPU, where Triton's interpreter stands in for the GPU."""

from collections.abc import Callable, Iterable, Iterator

import torch

from tests.runtime.kernels import interpreter
from thanos_deploy.gpu_records import Row
from thanos_deploy.steps import Task


def rows(step: Callable[[Task], Iterable[Row]], task: Task) -> Iterator[Row]:
    """The rows of a step, on one core."""
    torch.set_num_threads(1)
    with interpreter.mended():
        yield from step(task)
