"""A budget that decides which layers stay dense: the request, and the decisions made for it.

Standard library only, so that a report needs no PyTorch. `sensitivity` measures how much pruning a
group of layers changes the model, `forecast.savings` forecasts the time that it saves, and
`sensitivity.choose` chooses the groups that stay dense.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan
from typing import Literal

from thanos_deploy.errors import UsageError
from thanos_deploy.model.layer_names import place_of
from thanos_deploy.option import Options, option

# Tokens of each sequence in the KV cache of a decode step.
PAST = 512

_GOAL = re.compile(r"speed=(\d+(?:\.\d+)?)x?")
_STEP = re.compile(r"(decode|prefill):([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Budget(Options):
    """A speed required of the pruned model; layers that need not be pruned for it stay dense.

    Attributes:
        goal: "speed=FACTORx", the required speed as a multiple of the dense model's.
        gpu: name of a GPU in `forecast.datasheets`.
        step: the decode or prefill step that has to be that fast.
        measured: path of a file with measured times of matrix products, or None for the published
            measurements.

    Raises:
        UsageError: a value cannot be read, or no GPU is named.
    """

    goal: str = option(
        "",
        "--budget",
        "How many times as fast as the dense model the pruned model has to be on "
        "--budget-gpu, such as speed=1.2x. Layers whose pruning saves no time stay dense. "
        "So do, as far as the required speed allows, the layers whose pruning would "
        "change the model most for the time that it saves. This takes one more pass over "
        "all blocks of the model.",
        metavar="speed=FACTORx",
        later=True,
    )
    gpu: str = option(
        "",
        "--budget-gpu",
        "The GPU that --budget is for: a name that `plan --gpu` takes. Times are forecast "
        "in bf16, as the command plan does it.",
        metavar="NAME",
        later=True,
    )
    step: str = option(
        "decode:1",
        "--budget-step",
        "The step that --budget is about. decode:BATCH decodes one token in each of BATCH "
        f"sequences, after {PAST} tokens; prefill:TOKENS reads a prompt of TOKENS tokens.",
        metavar="decode:BATCH|prefill:TOKENS",
        later=True,
    )
    measured: str | None = option(
        None,
        "--budget-measured",
        "File with times of matrix products that were measured on that GPU, as for `plan "
        "--measured`.  [default: the measurements published with this project, if they "
        "include that GPU]",
        metavar="PATH",
        later=True,
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot be read, and a missing GPU."""
        Options.__post_init__(self)
        if _GOAL.fullmatch(self.goal) is None or self.speed <= 1.0:
            raise UsageError(
                f"--budget {self.goal!r}",
                fix="give a speed as a multiple of the dense model's, such as speed=1.2x",
            )
        if _STEP.fullmatch(self.step) is None:
            raise UsageError(
                f"--budget-step {self.step!r}", fix="use decode:BATCH or prefill:TOKENS"
            )
        if not self.gpu:
            raise UsageError(
                f"--budget {self.goal} without --budget-gpu",
                fix="name the GPU that the model is for; on a CPU, zeros save no time",
            )

    @property
    def speed(self) -> float:
        """The required speed as a multiple of the dense model's."""
        found = _GOAL.fullmatch(self.goal)
        assert found is not None
        return float(found[1])

    @property
    def sequences(self) -> int:
        """Number of sequences in the step; 1 for a prefill."""
        return self._count if self.decodes else 1

    @property
    def tokens(self) -> int:
        """Number of new tokens of each sequence."""
        return 1 if self.decodes else self._count

    @property
    def past(self) -> int:
        """Number of tokens of each sequence in the KV cache."""
        return PAST if self.decodes else 0

    @property
    def decodes(self) -> bool:
        """Whether the step is a decode step."""
        return self.step.startswith("decode")

    @property
    def _count(self) -> int:
        return int(self.step.partition(":")[2])


@dataclass(frozen=True, slots=True)
class Choice:
    """A group of layers that read one input, and what was decided about it.

    Attributes:
        layers: their full names.
        saves: what pruning them saves: seconds of a step, or a number of weights.
        costs: relative change of the block's output if only these layers are pruned; see
            `sensitivity`. NaN if it was not measured.
        dense: whether they stay dense.
    """

    layers: tuple[str, ...]
    saves: float
    costs: float
    dense: bool


@dataclass(frozen=True, slots=True)
class Choices:
    """The decisions about all groups that could be pruned, and the budget behind them.

    Attributes:
        unit: unit of the savings.
        whole: seconds of a step of the dense model, or the number of weights that could be pruned.
        purpose: the step and the GPU, in words; empty for weights.
        asked: the required speed, or the fraction of the weights that may stay dense.
        groups: the groups, in the order of the forward pass.
        measured: number of groups whose forecast uses measured times of matrix products.
    """

    unit: Literal["seconds", "weights"]
    whole: float
    purpose: str
    asked: float
    groups: tuple[Choice, ...]
    measured: int = 0

    @property
    def saved(self) -> float:
        """Total savings of the groups that are pruned."""
        return sum(group.saves for group in self.groups if not group.dense)

    @property
    def speed(self) -> float:
        """Speed of the step as a multiple of the dense model's, for a budget of seconds."""
        return self.whole / (self.whole - self.saved)

    @property
    def fastest(self) -> float:
        """The same speed if every group whose pruning saves time were pruned."""
        return self.whole / (self.whole - sum(max(0.0, group.saves) for group in self.groups))

    @property
    def sentence(self) -> str:
        """The decisions and their total effect, in words."""
        dense = sum(group.dense for group in self.groups)
        left = f"{dense} of {len(self.groups)} groups of layers stay dense"
        if self.unit == "weights":
            return (
                f"{left}, with {1.0 - self.saved / self.whole:.1%} of the weights that "
                f"could be pruned; --keep-dense allows {self.asked:.1%}."
            )
        free = sum(group.saves <= 0.0 for group in self.groups)
        return (
            f"{left}, {free} of them because pruning them saves no time. The forecast for "
            f"{self.purpose} is {self.speed:.2f} times the speed of the dense model, where "
            f"{self.asked:.2f} was asked for and {self.fastest:.2f} is possible. For "
            f"{self.measured} groups the forecast uses times of measured matrix products."
        )


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """All groups of one kind with the same decision, as a row of a table; see `decision_rows`.

    Attributes:
        layers: names of the layers, relative to the block.
        dense: whether they stay dense.
        blocks: numbers of the blocks, as in "0-3, 7".
        saves: what pruning all of them saves or would save, in words.
        costs: sum of the changes that pruning them makes or would make, in words.
    """

    layers: str
    dense: bool
    blocks: str
    saves: str
    costs: str

    @property
    def decision(self) -> str:
        """The decision in one word."""
        return "dense" if self.dense else "pruned"


# Column headings of a table with one row for each `DecisionRow`.
DECISION_COLUMNS = ("layers", "blocks", "decision", "pruning saves", "and changes")


def decision_cells(row: DecisionRow) -> tuple[str, ...]:
    """Return the cells of one row of that table."""
    return row.layers, row.blocks, row.decision, row.saves, row.costs


def decision_rows(choices: Choices) -> Iterator[DecisionRow]:
    """Summarise the decisions in one row for each kind of group and decision."""

    def kind(group: Choice) -> tuple[str, bool]:
        return joined([place_of(name)[1] for name in group.layers]), group.dense

    order = list(dict.fromkeys(name for name, _ in map(kind, choices.groups)))
    alike = sorted(choices.groups, key=lambda group: (order.index(kind(group)[0]), group.dense))
    for (layers, dense), found in groupby(alike, key=kind):
        groups = list(found)
        saves, costs = sum(one.saves for one in groups), sum(one.costs for one in groups)
        yield DecisionRow(
            layers,
            dense,
            ranges([place_of(one.layers[0])[0] for one in groups]),
            _saving(saves, choices),
            "not measured" if isnan(costs) else f"{costs:.4f}",
        )


def joined(layers: Sequence[str]) -> str:
    """Join the names of layers, with a common module named once: "mlp: gate_proj, up_proj"."""
    modules = {name.rpartition(".")[0] for name in layers}
    if len(layers) == 1 or len(modules) > 1:
        return ", ".join(layers)
    return f"{modules.pop()}: {', '.join(name.rpartition('.')[2] for name in layers)}"


def ranges(numbers: Sequence[int]) -> str:
    """Spell ascending numbers with consecutive ones joined: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _saving(saves: float, choices: Choices) -> str:
    if choices.unit == "weights":
        return f"{saves / 1e6:.2f} M weights ({saves / choices.whole:.1%})"
    return f"{saves * 1e3:.3f} ms ({saves / choices.whole:.1%})" if saves > 0.0 else "nothing"
