"""Which benchmark run speaks for a model, and what it says of it."""

from collections.abc import Iterator

from thanos_deploy.bundle.files import Json

# What a benchmark calls the dense model and the bundle that it is in.
DENSE, PRUNED = "dense", "pruned"

# What a benchmark calls the provider that is no GPU.
CPU = "CPUExecutionProvider"


def quoted(model: Json) -> Json | None:
    """The run whose figures stand for a model: the last valid one beside the dense model.

    Where none is valid, the last one.
    """
    return _last(_beside(model))


def quoted_on_gpu(model: Json) -> Json | None:
    """The same, of the runs on a GPU."""
    return _last([run for run in _beside(model) if run["provider"] != CPU])


def processor(run: Json) -> str:
    """What computed in a run: its GPU, or its CPU."""
    device = run["environment"] if run["provider"] == CPU else run.get("gpu") or {}
    return str(device.get("processor") or device.get("name") or "a GPU that did not say its name")


def measured(run: Json | None) -> Iterator[tuple[Json, str, Json]]:
    """Scenario, name of the metric and its ratio to the dense model, for all that have one."""
    for scenario in run["scenarios"] if run else ():
        for metric, ratio in scenario["results"].get(PRUNED, {}).get("ratio", {}).items():
            yield scenario, metric, ratio


def quoted_times(run: Json | None) -> list[tuple[str, Json]]:
    """Name and ratio of the first prefill and of the first decode scenario."""
    found: dict[str, tuple[str, Json]] = {}
    for scenario, metric, ratio in measured(run):
        if metric == scenario["headline"]:
            found.setdefault(scenario["kind"], (scenario["name"], ratio))
    return [found[kind] for kind in ("prefill", "decode") if kind in found]


def _beside(model: Json) -> list[Json]:
    """The runs beside the dense model."""
    return [
        run
        for run in model["bench"]
        if run["baseline"] == DENSE and PRUNED in run["subjects"] and run["scenarios"]
    ]


def _last(runs: list[Json]) -> Json | None:
    """The last valid one; where none is valid, the last one."""
    found = [run for run in runs if run["status"] == "VALID"] or runs
    return found[-1] if found else None
