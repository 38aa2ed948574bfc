"""Which benchmark run speaks for a model, and what it says of it."""

from collections.abc import Iterator

from thanos_deploy.artifact import Json

# What a benchmark calls the dense model and the bundle that it is in.
DENSE, PRUNED = "dense", "pruned"


def quoted(model: Json) -> Json | None:
    """The run whose figures stand for a model: the last valid one beside the dense model.

    Where none is valid, the last one.
    """
    beside: list[Json] = [
        run
        for run in model["bench"]
        if run["baseline"] == DENSE and PRUNED in run["subjects"] and run["scenarios"]
    ]
    valid = [run for run in beside if run["status"] == "VALID"]
    found = valid or beside
    return found[-1] if found else None


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
