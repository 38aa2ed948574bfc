"""The choice of the benchmark run whose figures are quoted for a model."""

from collections.abc import Iterable

from thanos_deploy.measure.run import DENSE, PRUNED, Interval, Run
from thanos_deploy.report.model import ModelReport


def quoted(model: ModelReport) -> Run | None:
    """Return the last VALID run that compares a model with the dense one.

    If none is VALID, return the last of them; None if there is no such run.
    """
    return _last(_beside(model))


def quoted_on_gpu(model: ModelReport) -> Run | None:
    """Return what `quoted` returns, from the runs on a GPU only."""
    return _last(run for run in _beside(model) if not run.on_cpu)


def quoted_times(run: Run | None) -> list[tuple[str, Interval]]:
    """Return name and time ratio of the first prefill and of the first decode scenario of a run."""
    found: dict[str, tuple[str, Interval]] = {}
    for scenario, metric, ratio in run.ratios if run else ():
        if metric == scenario.headline:
            found.setdefault(scenario.kind, (scenario.name, ratio))
    return [found[kind] for kind in ("prefill", "decode") if kind in found]


def _beside(model: ModelReport) -> list[Run]:
    """Return the runs whose baseline is the dense model."""
    return [
        run
        for run in model.bench
        if run.baseline == DENSE and PRUNED in run.subjects and run.scenarios
    ]


def _last(runs: Iterable[Run]) -> Run | None:
    """Return the last VALID run; if none is VALID, the last run."""
    given = list(runs)
    found = [run for run in given if run.status == "VALID"] or given
    return found[-1] if found else None
