"""Gates: limits on measured values, for a CI job that must fail when a limit is missed.

    [SCENARIO:]METRIC.STATISTIC[.ratio] COMPARISON NUMBER       decode.p50.ratio<0.8
    FIGURE[.ratio] COMPARISON NUMBER                            ppl.ratio<1.1

With `.ratio`, the value is that of the bundle divided by that of the baseline. Otherwise it is the
bundle's own: times in seconds, sizes in bytes, and throughput in tokens per second. A gate without
a scenario applies to every scenario that has the metric.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from thanos_deploy.errors import GateError, UsageError
from thanos_deploy.measure.latency import KINDS, Scenario
from thanos_deploy.measure.run import Run

METRICS = tuple(dict.fromkeys(metric for kind in KINDS.values() for metric in kind.metrics))
STATISTICS = {"p50": "median", "p90": "p90", "p99": "p99"}
FIGURES = (
    "file_bytes",
    "load_peak_bytes",
    "steady_bytes",
    "peak_bytes",
    "cache_bytes_per_token",
    "gpu_peak_bytes",
)
# Perplexity, fractions of right answers, divergence from the dense model, and agreement with it.
QUALITIES = ("ppl", "words", "choices", "kl", "agreement")

KNOWN = (
    f"{', '.join(METRICS)} (each with .{', .'.join(STATISTICS)}), "
    f"{', '.join((*FIGURES, *QUALITIES))}; each also with .ratio"
)

_COMPARISONS = {
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
}

_GATE = re.compile(
    r"(?:(?P<scenario>[^\s:<>=]+):)?(?P<name>[a-z0-9_.]+)\s*"
    r"(?P<comparison><=|>=|<|>)\s*(?P<limit>\S+)"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on one measured value.

    Attributes:
        text: the gate as the user wrote it.
        scenario: name of the scenario that the gate applies to; None for all that have the metric.
        name: a metric, a figure, or a quality.
        statistic: a key of `STATISTICS`; None for figures and qualities, which have one value.
        relative: whether the value is the ratio of the bundle's to the baseline's.
        comparison: "<", "<=", ">" or ">=".
        limit: the right side of the comparison.
    """

    text: str
    scenario: str | None
    name: str
    statistic: str | None
    relative: bool
    comparison: str
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value satisfies the limit."""
        return bool(_COMPARISONS[self.comparison](value, self.limit))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a gate, for one scenario.

    Attributes:
        gate: the gate as the user wrote it.
        scenario: name of the scenario; empty for a figure or a quality.
        value: the measured value; None if it was not measured.
        held: whether the value satisfies the limit; False also without a value, or if the value
            does not count.
        reason: why the gate is missed whatever its value; empty if the value counts.
    """

    gate: str
    scenario: str
    value: float | None
    held: bool
    reason: str

    def __str__(self) -> str:
        where = f" in {self.scenario}" if self.scenario else ""
        seen = "" if self.value is None else f": {self.value:.6g}"
        return f"{self.gate}{where}{seen}, {'held' if self.held else 'MISSED'}" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun(Run):
    """A run, and the outcomes of its gates."""

    gates: tuple[Outcome, ...]

    @classmethod
    def of(cls, run: Run, gates: Sequence[Outcome]) -> "JudgedRun":
        """Add outcomes to a run."""
        return cls(
            **{field.name: getattr(run, field.name) for field in fields(run)}, gates=tuple(gates)
        )

    @property
    def passed(self) -> bool:
        """Whether all gates are held."""
        return all(outcome.held for outcome in self.gates)

    def require(self) -> "JudgedRun":
        """Return this run if all gates are held.

        Raises:
            GateError: a gate is missed.
        """
        if not self.passed:
            raise GateError(
                "a gate was missed: " + "; ".join(map(str, self.gates)),
                fix="the measured values are above; repeat a run that is INVALID with --overwrite",
            )
        return self


def parse(text: str) -> Gate:
    """Parse the text of a gate.

    Raises:
        UsageError: the text is not a gate, or no measured value has that name.
    """
    match = _GATE.fullmatch(text.strip())
    if match is None or (limit := _number(match.group("limit"))) is None:
        raise UsageError(f"--gate {text!r}: not a gate", fix="write it like 'decode.p50.ratio<0.8'")
    scenario, called, comparison = match.group("scenario", "name", "comparison")
    parts = called.split(".")
    relative = len(parts) > 1 and parts[-1] == "ratio"
    match parts[:-1] if relative else parts:
        case [name, statistic] if name in METRICS and statistic in STATISTICS:
            pass
        case [name] if scenario is None and name in (*FIGURES, *QUALITIES):
            statistic = None
        case _:
            raise UsageError(
                f"--gate {text!r}: no measurement is called {called!r}"
                + (" in a scenario" if scenario else ""),
                fix=f"known are {KNOWN}",
            )
    return Gate(text, scenario, name, statistic, relative, comparison, limit)


def check(gates: Sequence[Gate], scenarios: Sequence[Scenario]) -> None:
    """Refuse gates on metrics that a run does not measure.

    Args:
        gates: the gates.
        scenarios: the scenarios of the run.

    Raises:
        UsageError: no scenario of a gate has its metric.
    """
    for gate in gates:
        if gate.statistic is None:
            continue
        having = [one.name for one in scenarios if gate.name in one.metrics]
        if not having or (gate.scenario is not None and gate.scenario not in having):
            raise UsageError(
                f"--gate {gate.text!r}: this run does not measure {gate.name}"
                + (f" in a scenario {gate.scenario!r}" if gate.scenario else ""),
                fix=f"it has {', '.join(having)}" if having else "ask for it with --scenario",
            )


def judge(
    gates: Sequence[Gate],
    run: Run,
    *,
    subject: str,
    quality: Mapping[str, Mapping[str, float]],
) -> list[Outcome]:
    """Judge gates by the values of a run.

    Args:
        gates: gates that have passed `check`.
        run: the run.
        subject: label of the bundle that the gates are about.
        quality: the known qualities: name -> label of the model -> value.
    """
    return [
        outcome
        for gate in gates
        for outcome in _outcomes(gate, run, subject=subject, quality=quality)
    ]


def _outcomes(
    gate: Gate, run: Run, *, subject: str, quality: Mapping[str, Mapping[str, float]]
) -> list[Outcome]:
    if gate.statistic is None:
        values: Mapping[str, float | None] = (
            quality.get(gate.name, {})
            if gate.name in QUALITIES
            else {label: getattr(one, gate.name) for label, one in run.subjects.items()}
        )
        return [_outcome(gate, "", values.get(subject), values.get(run.baseline), reason="")]
    # Times count only in a VALID run; sizes do not depend on an undisturbed machine.
    reason = "" if run.status == "VALID" else f"the run is {run.status}"
    statistic = STATISTICS[gate.statistic]
    found = []
    for scenario in run.scenarios:
        measured = {
            label: getattr(times.metrics[gate.name], statistic)
            for label, times in scenario.results.items()
            if gate.name in times.metrics
        }
        if measured and gate.scenario in (None, scenario.name):
            own, baseline = measured[subject], measured[run.baseline]
            found.append(_outcome(gate, scenario.name, own, baseline, reason=reason))
    return found


def _outcome(
    gate: Gate, scenario: str, own: float | None, baseline: float | None, *, reason: str
) -> Outcome:
    value = own
    if gate.relative:
        value = own / baseline if own is not None and baseline else None
    if value is None:
        reason = "not measured"
    held = value is not None and not reason and gate.holds(value)
    return Outcome(gate.text, scenario, value, held, reason)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None
