"""Time that Thanos takes to prune a layer on a GPU, and agreement with the CPU."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_deploy import methods
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.gpu.rows import CheckRow, HessianRow, PruningRow, Row
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.machine import devices
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.solver.hessian import factor
from thanos_deploy.solver.layer import LayerProblem, LayerResult

_METHOD, _PATTERN = "thanos", SemiStructured(2, 4)

# Sums in another order can change the choice between two weights that are equally good. For that
# reason, these fractions of the mask's entries and of the loss may differ.
_MASK_LIMIT, _LOSS_LIMIT = 1e-2, 1e-3

# Number of tokens that are added to a Hessian at once.
_TOKENS_AT_ONCE = 8192

# The presets that differ in how they solve a layer.
PRESETS = ("best", "fast", "paper")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the layers to prune.

    Attributes:
        layers: outputs and inputs of each timed layer.
        compared: rows and columns of the layer that is pruned on the CPU too.
        hessian: columns and tokens of the Hessian whose accumulation is timed.
    """

    layers: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    compared: int = 1024
    hessian: tuple[int, int] = (4096, 262144)


def rows(sizes: Sizes, task: Task) -> Iterator[Row]:
    """Yield the comparison with the CPU, and the times.

    Timed are the accumulation of a Hessian, its factorisation, and each preset on each layer.
    """
    yield compare(sizes.compared, task.device)
    yield accumulate(*sizes.hessian, task.device)
    widest = max(inputs for _, inputs in sizes.layers)
    yield factoring(widest, task.device)
    for preset in PRESETS:
        for outputs, inputs in sizes.layers:
            layer = problem(outputs, inputs, task.device)
            started = time.perf_counter()
            result = solve(layer, preset)
            devices.wait(torch.device(task.device))
            yield PruningRow(
                _METHOD,
                preset,
                str(_PATTERN),
                outputs,
                inputs,
                seconds=time.perf_counter() - started,
                loss=float(result.relative_error),
            )


def problem(outputs: int, inputs: int, device: str) -> LayerProblem:
    """Make a random layer whose inputs are correlated and differ in scale, as in a model."""
    generator = torch.Generator(device).manual_seed(outputs + inputs)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    scales = (0.5 * random(inputs)).exp()
    common = random(max(1, inputs // 16), inputs)
    hessian = torch.zeros(inputs, inputs, device=device)
    for _ in range(2):
        x = (random(inputs, inputs) + random(inputs, len(common)) @ common / 4) * scales
        hessian.addmm_(x.T, x)
    return LayerProblem(random(outputs, inputs) / inputs**0.5, hessian, "layer")


def solve(layer: LayerProblem, preset: str) -> LayerResult:
    """Prune a layer with the options of a preset."""
    method = methods.load(_METHOD)
    return method.prune(layer, _PATTERN, method.preset(preset).options)


def accumulate(columns: int, tokens: int, device: str) -> HessianRow:
    """Time the accumulation of the statistics of a number of tokens in bfloat16."""
    at_once = min(tokens, _TOKENS_AT_ONCE)
    x = torch.randn(at_once, columns, dtype=torch.bfloat16, device=device)
    statistics = Statistics.empty(columns, device=torch.device(device))
    statistics.add(x, None)
    devices.wait(torch.device(device))
    started = time.perf_counter()
    for _ in range(tokens // at_once):
        statistics.add(x, None)
    statistics.complete()
    devices.wait(torch.device(device))
    return HessianRow(columns, tokens // at_once * at_once, time.perf_counter() - started)


def factoring(columns: int, device: str) -> CheckRow:
    """Time the factorisation of a Hessian in float64, the second time that it is computed."""
    layer = problem(1, columns, device)
    for _ in range(2):
        devices.wait(torch.device(device))
        started = time.perf_counter()
        factor(layer)
        devices.wait(torch.device(device))
        spent = time.perf_counter() - started
    return CheckRow("pruning", f"factoring {columns} columns", "PASS", f"{spent:.3f} s")


def compare(size: int, device: str) -> CheckRow:
    """Prune the same layer on this device and on the CPU, and compare masks and losses."""
    here = problem(size, size, device)
    there = LayerProblem(here.weight.cpu(), here.hessian.cpu(), "layer")
    ours, theirs = solve(here, "fast"), solve(there, "fast")
    mask = float((ours.mask.cpu() != theirs.mask).double().mean())
    loss = abs(float(ours.relative_error) / float(theirs.relative_error) - 1)
    agrees = mask <= _MASK_LIMIT and loss <= _LOSS_LIMIT
    return CheckRow(
        "pruning",
        f"{size} x {size} against the CPU",
        "PASS" if agrees else "FAIL",
        f"{mask:.1e} of the mask differ, limit {_MASK_LIMIT:g}; the loss differs by "
        f"{loss:.1e}, limit {_LOSS_LIMIT:g}",
        ""
        if agrees
        else "prune on the CPU, and report this with the name of the GPU and the versions of "
        "the packages",
    )
