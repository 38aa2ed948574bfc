"""Forecast the time that pruning each group of layers would save on a GPU, with `roofline`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.errors import UsageError
from thanos_deploy.forecast import datasheets
from thanos_deploy.forecast.forecast import (
    DENSE,
    Variant,
    architecture,
    forecast,
    is_two_of_four,
)
from thanos_deploy.forecast.measurements import published_measurements, read_measurements
from thanos_deploy.forecast.roofline import Gemm, Setting, Step, layer, product
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.budget import Budget, Choice, Choices
from thanos_deploy.pruning.layers import linear_shapes

_DTYPE = "bf16"


@dataclass(frozen=True, slots=True)
class Savings:
    """The seconds of a step that pruning each group of layers would save.

    Attributes:
        dense: seconds of the step with the dense model.
        seconds: maps a group, as the full names of its layers, to the seconds that pruning the
            group saves; 0 or negative where pruning saves no time.
        measured: number of groups whose figure is from measured products.
        purpose: the step and the GPU, in words.
    """

    dense: float
    seconds: Mapping[tuple[str, ...], float]
    measured: int
    purpose: str

    @property
    def fastest(self) -> float:
        """Speedup of the step over the dense model if all groups that save time are pruned."""
        most = sum(max(0.0, saved) for saved in self.seconds.values())
        return self.dense / (self.dense - most)

    def room(self, budget: Budget) -> float:
        """Seconds of the possible savings that layers left dense may give up within a budget.

        Raises:
            UsageError: even pruning every group that saves time does not reach the budget's speed.
        """
        most = sum(max(0.0, saved) for saved in self.seconds.values())
        left = most - self.dense * (1.0 - 1.0 / budget.speed)
        # The tolerance lets a user ask for the largest speed as it is printed, with two decimals.
        if most <= 0.0 or self.fastest < budget.speed - 0.005:
            down = math.floor(100 * self.fastest) / 100
            raise UsageError(
                f"--budget {budget.goal}: by the forecast, pruning every layer makes "
                f"{self.purpose} at most {down:.2f} times as fast",
                fix=f"ask for at most speed={down:.2f}x, or name another --budget-step"
                if down > 1.0
                else "name another --budget-step (`thanos-deploy plan` shows the times of the "
                "steps); only zeros in the pattern 2:4 save time, and --pattern "
                "structured:FRACTION makes every step faster",
            )
        return max(0.0, left)

    def choices(self, budget: Budget, groups: tuple[Choice, ...]) -> Choices:
        """Return the record of the decisions about all groups."""
        return Choices("seconds", self.dense, self.purpose, budget.speed, groups, self.measured)


def savings(checkpoint: Checkpoint, patterns: Mapping[str, Pattern], budget: Budget) -> Savings:
    """Forecast the time that pruning each group of layers would save.

    A group is the layers of a block that read one input. Servers compute a group as one matrix
    product, so it saves time only if each of its layers becomes 2:4.

    Args:
        checkpoint: the dense model.
        patterns: maps the full name of each layer that is to be pruned to its pattern.
        budget: the step, the GPU, and the file of measured products if there is one.

    Raises:
        UsageError: the GPU is not in the table of data sheets.
        InputError: the file of measured products cannot be used.
        ModelError: the model type cannot be forecast; see `architecture`.
    """
    gpu = datasheets.find(budget.gpu)
    known = (
        published_measurements(gpu, _DTYPE)
        if budget.measured is None
        else read_measurements(Path(budget.measured).expanduser(), gpu, _DTYPE)
    )
    setting = Setting(gpu, _DTYPE, known)
    step = Step(budget.sequences, budget.tokens, budget.past)
    dense = forecast(Variant(DENSE, architecture(checkpoint), sparse=False), step, setting)
    shapes, saved, measured = linear_shapes(checkpoint), {}, 0
    for block in checkpoint.blocks:
        for group in block.groups:
            names = [block.prefix + name for name in group]
            pruned = tuple(name for name in names if name in patterns)
            if not pruned:
                continue
            seconds = 0.0
            if len(pruned) == len(names) and all(is_two_of_four(patterns[one]) for one in names):
                rows = sum(shapes[name][0] for name in names)
                gemm = Gemm(" + ".join(group), rows, shapes[names[0]][1])
                kernel = product(gemm, step.batch * step.tokens, _DTYPE)
                before, after = (layer(kernel, setting, sparse=one) for one in (False, True))
                seconds = before.likely - after.likely
                measured += after.measured
            saved[pruned] = seconds
    what = f"decode at batch {step.batch}" if budget.decodes else f"prefill of {step.tokens} tokens"
    return Savings(
        sum(one.likely for one in dense), saved, measured, f"{what} on {gpu.name} in {_DTYPE}"
    )
