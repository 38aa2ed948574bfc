"""Bundles side by side: what they take, how that compares, and whether the figures can be trusted.

A run is one JSON value. It is VALID, or INVALID with reasons when the machine moved while it was
measured or when an engine differs from itself, or INTERRUPTED with the rounds that were complete.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from runtime.engines.onnxruntime import PROVIDERS
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu.nvml import Gpu
from thanos_deploy.machine import environment, stillness
from thanos_deploy.machine.stillness import Stillness
from thanos_deploy.measure import ceilings, paired, statistics
from thanos_deploy.measure.ceilings import Machine, Work
from thanos_deploy.measure.latency import OpenLoop, Scenario
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.paired import Engines, Memory, Round, WarmUp
from thanos_deploy.progress import OnProgress, silent

FORMAT = "thanos-deploy/bench/1"

# An open loop is offered this much of what the baseline can take.
_UTILISATION = 0.5

# The baseline has drifted if its median moved by more than this fraction, and so steadily that
# chance would do it in fewer runs than this.
_MOST_DRIFT = 0.05
_CHANCE = 0.01

_UNITS = {"tokens_per_second": "1/s"}


def measure(
    bundles: Mapping[str, Bundle],
    request: BenchRequest,
    *,
    same: bool = False,
    on_progress: OnProgress = silent,
) -> Json:
    """Measure exported bundles in turns.

    Args:
        bundles: by label; the first is the baseline.
        request: what to measure.
        same: they are all the same, so every ratio should be 1 (an A/A run); the intervals are
            then widened so that all of them together hold 1 with the usual probability.
        on_progress: told of every round.

    Returns:
        a run, as in the module's docstring.

    Raises:
        DeployError: a model cannot be loaded.
        KeyboardInterrupt: before one round was complete.
    """
    on_progress(0, request.rounds)
    threads = request.threads or environment.cores()
    subjects = {label: describe(bundle) for label, bundle in bundles.items()}
    works = {
        label: ceilings.count(
            bundle.path / "onnx" / "model.onnx",
            cache_bytes_per_token=subjects[label]["cache_bytes_per_token"],
        )
        for label, bundle in bundles.items()
    }
    dtypes = {
        label: ceilings.computed_in(facts["dtype"], provider=request.provider)
        for label, facts in subjects.items()
    }
    baseline = next(iter(bundles))
    device = Gpu.probe() if request.provider == "cuda" else None
    untouched = device and device.read()
    readings = [stillness.read(time.process_time())]
    machine = ceilings.measure(
        works[baseline].weight_bytes, provider=request.provider, threads=threads
    )
    without_models = device and device.read()
    paths = {label: bundle.path for label, bundle in bundles.items()}
    rounds: list[Round] = []
    memory: dict[str, Memory] | None = None
    with paired.opened(paths, provider=request.provider, threads=threads) as engines:
        scenarios, warm = _warm_up(engines, request, baseline)
        readings.append(_reading(engines))
        on_device = [device.read()] if device else []
        try:
            for number in range(request.rounds):
                rounds.append(engines.take_turns(scenarios, number))
                readings.append(_reading(engines))
                if device:
                    on_device.append(device.read())
                on_progress(number + 1, request.rounds)
            memory = engines.memory()
        except KeyboardInterrupt:
            if not rounds:
                raise
        processes, loaded = engines.processes, engines.loaded
    still = stillness.judge(readings)
    # This process is on the GPU too if it measured the ceilings there.
    on_gpu = {*processes.values(), *([os.getpid()] if machine else [])}
    level = _level(scenarios, len(bundles)) if same else statistics.LEVEL
    compared = [
        {
            **_fields(scenario),
            "warmup": {"rounds": warm[scenario.name].rounds, "stable": warm[scenario.name].stable},
            "results": _results(
                scenario,
                [one[scenario.name] for one in rounds],
                level=level,
                works=works,
                machine=machine,
                dtypes=dtypes,
            ),
        }
        for scenario in scenarios
    ]
    reasons = [
        *still.reasons,
        *(nvml.reasons(untouched, on_device, on_gpu) if untouched else []),
        *_drifts(compared, baseline, len(rounds)),
        *(_differences(compared) if same else []),
    ]
    if memory is None:
        reasons.insert(0, f"interrupted after {len(rounds)} of {request.rounds} rounds")
    for label, facts in subjects.items():
        held = without_models and nvml.held(without_models, on_device, [processes[label]])
        # What the whole GPU holds is of all models together.
        own = held if held and (held.by == "process" or len(processes) == 1) else None
        facts |= asdict(loaded[label])
        facts |= (
            dict.fromkeys(("steady_bytes", "peak_bytes"))
            if memory is None
            else asdict(memory[label])
        )
        facts["gpu_peak_bytes"] = own and own.bytes
    return {
        "format": FORMAT,
        "run": request.run,
        "status": "INTERRUPTED" if memory is None else "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "backend": "onnxruntime",
        "provider": PROVIDERS[request.provider],
        "baseline": baseline,
        "rounds": len(rounds),
        "request": request.to_json(),
        "environment": {
            **encode(environment.describe()),
            "threads": threads,
            "governor": stillness.governor(),
            "cpu_flags": stillness.arithmetic_flags(),
        },
        "machine": _machine(machine, still),
        "gpu": device
        and without_models
        and _device(device, on_device, nvml.held(without_models, on_device, processes.values())),
        "subjects": subjects,
        "scenarios": compared,
    }


def describe(bundle: Bundle) -> Json:
    """What is known of an exported bundle without running it."""
    pruned, graph = bundle.stages.get("prune"), bundle.stages["onnx"]
    return {
        "model": bundle.source.name,
        "sha256": bundle.source.sha256,
        "pattern": pruned and pruned.options["pattern"],
        "method": pruned and pruned.options["method"],
        "dtype": graph.options["dtype"],
        "file_bytes": sum(
            file.bytes for name, file in graph.files.items() if name.endswith((".onnx", ".data"))
        ),
        "cache_bytes_per_token": graph.result["cache_bytes_per_token"],
    }


def without_samples(run: Json) -> Json:
    """A run without its raw samples, for the manifest and for people."""

    def bare(value: Any) -> Any:
        match value:
            case dict():
                return {name: bare(part) for name, part in value.items() if name != "samples"}
            case list():
                return [bare(part) for part in value]
        return value

    stripped: Json = bare(run)
    return stripped


def _warm_up(
    engines: Engines, request: BenchRequest, baseline: str
) -> tuple[list[Scenario], dict[str, WarmUp]]:
    """Turns that do not count; then the rate of an open loop is known."""
    scenarios: list[Scenario] = []
    warm = {}
    for scenario in request.scenarios:
        # Waiting warms nothing.
        work = scenario.unloaded if isinstance(scenario, OpenLoop) else scenario
        warm[scenario.name] = engines.warm_up(work, at_most=request.warmup)
        if isinstance(scenario, OpenLoop) and scenario.offered_per_second is None:
            (seconds,) = warm[scenario.name].last[baseline]["total"]
            scenario = replace(scenario, offered_per_second=_UTILISATION / seconds)
        scenarios.append(scenario)
    return scenarios, warm


def _reading(engines: Engines) -> stillness.Reading:
    return stillness.read(engines.cpu_seconds + time.process_time())


def _fields(scenario: Scenario) -> Json:
    sizes = dict.fromkeys(("batch", "prompt", "past", "new_tokens"), 0)
    return {
        "name": scenario.name,
        "kind": scenario.kind,
        "headline": scenario.headline,
        **sizes,
        "batch": scenario.batch,
        **asdict(scenario),
    }


def _results(
    scenario: Scenario,
    rounds: Sequence[Mapping[str, Mapping[str, list[float]]]],
    *,
    level: float,
    works: Mapping[str, Work],
    machine: Machine | None,
    dtypes: Mapping[str, str],
) -> Json:
    """What one scenario showed, by label."""
    samples = {
        label: {
            metric: [value for one in rounds for value in one[label][metric]]
            for metric in rounds[0][label]
        }
        for label in rounds[0]
    }
    baseline = next(iter(samples))
    results: Json = {}
    for label, of_label in samples.items():
        metrics = {
            metric: {
                "unit": _UNITS.get(metric, "s"),
                "samples": of_label[metric],
                **asdict(statistics.summarise(of_label[metric])),
            }
            for metric in scenario.metrics
        }
        result: Json = {"metrics": metrics}
        if label != baseline and len(rounds) > 1:
            result["ratio"] = {
                metric: asdict(
                    statistics.ratio(
                        of_label[metric], samples[baseline][metric], rounds=len(rounds), level=level
                    )
                )
                for metric in scenario.metrics
            }
        least = machine and ceilings.ceiling(works[label], scenario, machine, dtypes[label])
        result["ceiling"] = least and asdict(least)
        result["of_ceiling"] = least and least.seconds / metrics[scenario.headline]["median"]
        if isinstance(scenario, OpenLoop):
            served = scenario.requests * len(rounds)
            result["achieved_per_second"] = served / sum(of_label["span"])
        results[label] = result
    return results


def _level(scenarios: Sequence[Scenario], subjects: int) -> float:
    """Of each interval, so that all together miss no oftener than one usually does (Bonferroni)."""
    intervals = (subjects - 1) * sum(len(scenario.metrics) for scenario in scenarios)
    return 1 - (1 - statistics.LEVEL) / intervals


def _drifts(scenarios: Sequence[Json], baseline: str, rounds: int) -> list[str]:
    """Where the baseline did not stay what it was."""
    found = []
    for scenario in scenarios:
        if scenario["kind"] == OpenLoop.kind:  # whose arrivals differ from round to round
            continue
        samples = scenario["results"][baseline]["metrics"][scenario["headline"]]
        moved = statistics.drift(samples["samples"], rounds=rounds)
        if moved and abs(moved.change) > _MOST_DRIFT and moved.p_value < _CHANCE:
            found.append(
                f"{scenario['name']}: {baseline} drifted by {moved.change:+.1%} from the first "
                f"third of the rounds to the last (limit {_MOST_DRIFT:.0%})"
            )
    return found


def _differences(scenarios: Sequence[Json]) -> list[str]:
    """Where a model differs from itself."""
    found = []
    for scenario in scenarios:
        for label, result in scenario["results"].items():
            for metric, ratio in result.get("ratio", {}).items():
                if 1.0 not in statistics.Interval(**ratio):
                    found.append(
                        f"{scenario['name']}: {metric} of {label} is {ratio['estimate']:.3f} "
                        f"({ratio['low']:.3f} to {ratio['high']:.3f}) of the same model's"
                    )
    return found


def _machine(machine: Machine | None, still: Stillness) -> Json:
    measured = (
        {"memory_bandwidth_bytes_per_second": None, "gemm_flops_per_second": {}}
        if machine is None
        else asdict(machine)
    )
    return {**measured, **asdict(still)}


def _device(device: Gpu, readings: Sequence[nvml.Reading], held: nvml.Held | None) -> Json:
    clocks = [reading.clock_hz for reading in readings]
    power = [reading.power_watts for reading in readings if reading.power_watts is not None]
    return {
        "name": device.name,
        "clock_hz": [min(clocks), max(clocks)],
        "power_watts": [min(power), max(power)] if power else None,
        "throttle_reasons": sorted(
            {name for reading in readings for name in reading.throttle_reasons}
        ),
        "memory_of_all_models": held and asdict(held),
    }
