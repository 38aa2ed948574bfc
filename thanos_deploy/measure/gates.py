"""Gates: limits on what was measured, for a CI job that must fail when they are missed.

    [SCENARIO:]METRIC.STATISTIC[.ratio] COMPARISON NUMBER       decode.p50.ratio<0.8
    FIGURE[.ratio] COMPARISON NUMBER                            ppl.ratio<1.1

With `.ratio` a value is the bundle's over the baseline's, else the bundle's own, in seconds, bytes
or tokens per second. Without a scenario a gate holds for every one that has the metric.
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
# Perplexity, shares of right answers, divergence from the dense model, and agreement with it.
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
    """A limit.

    Attributes:
        text: as it was given.
        scenario: the only one that it is for; None for all that have the metric.
        name: a metric, a figure, or a quality.
        statistic: a key of `STATISTICS`; None where there is only one value.
        relative: the value is that of the bundle over that of the baseline.
        comparison: a key of what can be compared.
        limit: what to compare with.
    """

    text: str
    scenario: str | None
    name: str
    statistic: str | None
    relative: bool
    comparison: str
    limit: float

    def holds(self, value: float) -> bool:
        """The value keeps the limit."""
        return bool(_COMPARISONS[self.comparison](value, self.limit))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a gate in one scenario.

    Attributes:
        gate: as it was given.
        scenario: where the value is from; empty if it is of no scenario.
        value: None if it was not measured.
        held: False also where nothing was measured, or not reliably.
        reason: why a value does not count; empty if it does.
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
    """A run and what became of the gates that it was asked to pass."""

    gates: tuple[Outcome, ...]

    @classmethod
    def of(cls, run: Run, gates: Sequence[Outcome]) -> "JudgedRun":
        """A run with outcomes."""
        return cls(
            **{field.name: getattr(run, field.name) for field in fields(run)}, gates=tuple(gates)
        )

    @property
    def passed(self) -> bool:
        """Every gate was held."""
        return all(outcome.held for outcome in self.gates)

    def require(self) -> "JudgedRun":
        """The same run.

        Raises:
            GateError: a gate was missed.
        """
        if not self.passed:
            raise GateError(
                "a gate was missed: " + "; ".join(map(str, self.gates)),
                fix="see above for what was measured; a run that is INVALID can be repeated with "
                "--overwrite",
            )
        return self


def parse(text: str) -> Gate:
    """Read a gate.

    Raises:
        UsageError: it is not a gate, or no measurement has that name.
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
    """Refuse gates on what a run does not measure.

    Raises:
        UsageError: there is such a gate.
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
    """Judge gates.

    Args:
        gates: that `check` has let pass.
        run: of a bench.
        subject: label of the bundle that they are about.
        quality: by name and label, as far as it is known.
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
    # Sizes do not depend on the machine standing still; times do.
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
