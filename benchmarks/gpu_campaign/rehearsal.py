"""Doing a step on a CPU, where Triton's interpreter stands in for the GPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from tests.runtime.kernels import interpreter
from thanos_deploy.gpu_records import Row
from thanos_deploy.steps import Task


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """One core is enough, and the interpreter is mended."""
    torch.set_num_threads(1)
    with interpreter.mended():
        yield


def rows(step: Callable[[Task], Iterable[Row]], task: Task) -> Iterator[Row]:
    """The rows of a step."""
    with on_a_cpu():
        yield from step(task)
