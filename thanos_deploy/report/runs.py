"""Which benchmark run speaks for a model, and what it says of it."""

from collections.abc import Iterable

from thanos_deploy.measure.run import DENSE, PRUNED, Interval, Run
from thanos_deploy.report.model import ModelReport


def quoted(model: ModelReport) -> Run | None:
    """The run whose figures stand for a model: the last valid one beside the dense model.

    Where none is valid, the last one.
    """
    return _last(_beside(model))


def quoted_on_gpu(model: ModelReport) -> Run | None:
    """The same, of the runs on a GPU."""
    return _last(run for run in _beside(model) if not run.on_cpu)


def quoted_times(run: Run | None) -> list[tuple[str, Interval]]:
    """Name and ratio of the first prefill and of the first decode scenario."""
    found: dict[str, tuple[str, Interval]] = {}
    for scenario, metric, ratio in run.ratios if run else ():
        if metric == scenario.headline:
            found.setdefault(scenario.kind, (scenario.name, ratio))
    return [found[kind] for kind in ("prefill", "decode") if kind in found]


def _beside(model: ModelReport) -> list[Run]:
    """The runs beside the dense model."""
    return [
        run
        for run in model.bench
        if run.baseline == DENSE and PRUNED in run.subjects and run.scenarios
    ]


def _last(runs: Iterable[Run]) -> Run | None:
    """The last valid one; where none is valid, the last one."""
    given = list(runs)
    found = [run for run in given if run.status == "VALID"] or given
    return found[-1] if found else None
