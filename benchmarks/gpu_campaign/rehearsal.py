"""Run a step on a CPU, with stand-ins for the GPU."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from unittest import mock

import torch

from runtime.engines import torch as torch_engine
from runtime.kernels import choice, timing
from tests.runtime.kernels import interpreter, simulated_gpu
from thanos_deploy.gpu.rows import Row
from thanos_deploy.gpu_check.steps import Task

StandIn = Callable[[Task], AbstractContextManager[None]]


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Compute on one thread, with the errors of Triton's interpreter worked around."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with interpreter.mended():
            yield
    finally:
        torch.set_num_threads(threads)


def rows(step: Callable[[Task], Iterable[Row]], name: str, task: Task) -> Iterator[Row]:
    """Yield the rows of a step, run with the stand-ins that its name needs."""
    with on_a_cpu(), _STAND_INS.get(name, nullcontext)(task):
        yield from step(task)


def simulated_driver(task: Task) -> AbstractContextManager[None]:
    """Launch the kernels in CUDA C++ as on a GPU, with a driver that simulates them."""
    return simulated_gpu.driver(task.folder)


@contextmanager
def choosing(task: Task) -> Iterator[None]:
    """Let the variant `sparse` choose among the kernels that run here: dense and Triton.

    The other kernels refuse the CPU themselves, as they refuse a GPU that lacks their library.
    """
    with (
        simulated_gpu.card(),
        mock.patch.object(torch_engine, "_require_device"),
        mock.patch.object(choice, "replayed", _once),
        # No bucket for one token, which takes the interpreter seconds for each layer.
        mock.patch.multiple(choice, ENDS=(2,), TOKENS=(2, 17)),
        mock.patch.dict(os.environ, THANOS_DEPLOY_CACHE=str(task.folder)),
    ):
        yield


def _once(calls: Sequence[Callable[[], object]]) -> float:
    return median(timing.replayed(calls, samples=1, warmup=0))


_STAND_INS: dict[str, StandIn] = {
    "correctness:mma-sp": simulated_driver,
    "model:2:4": choosing,
    "model:structured+2:4": choosing,
}
