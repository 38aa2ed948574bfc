"""Measure bundles side by side, compare them, and judge whether the figures can be trusted.

The result of a run is one record with a status. A run is VALID; or INVALID with reasons, if the
machine was disturbed or, in an A/A run, an engine differs from itself; or INTERRUPTED, with the
rounds that were complete.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from runtime.engines.onnxruntime import PROVIDERS
from thanos_deploy.bundle import layout
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu.nvml import Monitor
from thanos_deploy.machine import environment, stillness
from thanos_deploy.machine.stillness import Stillness
from thanos_deploy.measure import ceilings, paired, statistics
from thanos_deploy.measure.ceilings import Machine, Work
from thanos_deploy.measure.latency import OpenLoop, Scenario
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.paired import Engines, Memory, Round, WarmUp
from thanos_deploy.measure.run import (
    BenchEnvironment,
    BenchGpu,
    BenchMachine,
    Interval,
    Metric,
    ModelTimes,
    Run,
    ScenarioTimes,
    Subject,
    WarmUpRecord,
)
from thanos_deploy.progress import OnProgress, silent

# Request rate of an open loop, as a fraction of the highest rate that the baseline can serve.
_UTILISATION = 0.5


def measure(
    bundles: Mapping[str, Path],
    subjects: Mapping[str, Subject],
    request: BenchRequest,
    *,
    same: bool = False,
    on_progress: OnProgress = silent,
) -> Run:
    """Measure exported bundles, which take turns in every round.

    Args:
        bundles: maps a label to a bundle folder; the first one is the baseline.
        subjects: by label, the facts about each model that are known without running it.
        request: the scenarios, and how to run them.
        same: whether all bundles are the same model (an A/A run), so that every ratio should be 1.
            The confidence intervals are then widened, so that all of them together contain 1 with
            the usual probability.
        on_progress: called after every round.

    Raises:
        DeployError: a model cannot be loaded.
        KeyboardInterrupt: the user interrupted before the first round was complete.
    """
    on_progress(0, request.rounds)
    threads = request.threads or environment.cores()
    works = {
        label: ceilings.count(
            path / layout.ONNX / layout.GRAPH,
            cache_bytes_per_token=subjects[label].cache_bytes_per_token,
        )
        for label, path in bundles.items()
    }
    dtypes = {
        label: ceilings.computed_in(subject.dtype, provider=request.provider)
        for label, subject in subjects.items()
    }
    baseline = next(iter(bundles))
    device = Monitor.probe() if request.provider == "cuda" else None
    untouched = device and device.read()
    readings = [stillness.read(time.process_time())]
    machine = ceilings.measure(
        works[baseline].weight_bytes, provider=request.provider, threads=threads
    )
    without_models = device and device.read()
    rounds: list[Round] = []
    memory: dict[str, Memory] | None = None
    with paired.opened(bundles, provider=request.provider, threads=threads) as engines:
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
    # This process uses the GPU too if it has measured the ceilings there.
    on_gpu = {*processes.values(), *([os.getpid()] if machine else [])}
    level = _level(scenarios, len(bundles)) if same else statistics.LEVEL
    compared = tuple(
        _times(
            scenario,
            [one[scenario.name] for one in rounds],
            WarmUpRecord(warm[scenario.name].rounds, warm[scenario.name].stable),
            level=level,
            works=works,
            machine=machine,
            dtypes=dtypes,
        )
        for scenario in scenarios
    )
    reasons = [
        *still.reasons,
        *(nvml.reasons(untouched, on_device, on_gpu) if untouched else []),
        *_drifts(compared, baseline, len(rounds)),
        *(_differences(compared) if same else []),
    ]
    if memory is None:
        reasons.insert(0, f"interrupted after {len(rounds)} of {request.rounds} rounds")
    measured = {}
    for label, subject in subjects.items():
        held = without_models and nvml.held(without_models, on_device, [processes[label]])
        # A figure for the whole GPU is the memory of all models together.
        own = held if held and (held.by == "process" or len(processes) == 1) else None
        measured[label] = replace(
            subject,
            **asdict(loaded[label]),
            **({} if memory is None else asdict(memory[label])),
            gpu_peak_bytes=own.bytes if own else None,
        )
    return Run(
        run=request.run,
        status="INTERRUPTED" if memory is None else "INVALID" if reasons else "VALID",
        reasons=tuple(reasons),
        backend="onnxruntime",
        provider=PROVIDERS[request.provider],
        baseline=baseline,
        rounds=len(rounds),
        request=request,
        environment=_environment(threads),
        machine=_machine(machine, still),
        gpu=_gpu(device, on_device, nvml.held(without_models, on_device, processes.values()))
        if device and without_models
        else None,
        subjects=measured,
        scenarios=compared,
    )


def _warm_up(
    engines: Engines, request: BenchRequest, baseline: str
) -> tuple[list[Scenario], dict[str, WarmUp]]:
    """Warm up every scenario; choose an open loop's request rate from its warm-up."""
    scenarios: list[Scenario] = []
    warm = {}
    for scenario in request.scenarios:
        # Waiting for arrivals warms nothing up, so an open loop is warmed up without it.
        work = scenario.unloaded if isinstance(scenario, OpenLoop) else scenario
        warm[scenario.name] = engines.warm_up(work, at_most=request.warmup)
        if isinstance(scenario, OpenLoop) and scenario.offered_per_second is None:
            (seconds,) = warm[scenario.name].last[baseline]["total"]
            scenario = replace(scenario, offered_per_second=_UTILISATION / seconds)
        scenarios.append(scenario)
    return scenarios, warm


def _reading(engines: Engines) -> stillness.Reading:
    return stillness.read(engines.cpu_seconds + time.process_time())


def _times(
    scenario: Scenario,
    rounds: Sequence[Mapping[str, Mapping[str, list[float]]]],
    warmup: WarmUpRecord,
    *,
    level: float,
    works: Mapping[str, Work],
    machine: Machine | None,
    dtypes: Mapping[str, str],
) -> ScenarioTimes:
    """Summarise one scenario for every model."""
    samples = {
        label: {
            metric: [value for one in rounds for value in one[label][metric]]
            for metric in rounds[0][label]
        }
        for label in rounds[0]
    }
    baseline = next(iter(samples))
    results = {}
    for label, of_label in samples.items():
        metrics = {name: _metric(name, of_label[name]) for name in scenario.metrics}
        least = (
            ceilings.ceiling(works[label], scenario, machine, dtypes[label]) if machine else None
        )
        results[label] = ModelTimes(
            metrics,
            ratio={}
            if label == baseline or len(rounds) < 2
            else {
                metric: statistics.ratio(
                    of_label[metric], samples[baseline][metric], rounds=len(rounds), level=level
                )
                for metric in scenario.metrics
            },
            ceiling=least,
            of_ceiling=least.seconds / metrics[scenario.headline].median if least else None,
            achieved_per_second=scenario.requests * len(rounds) / sum(of_label["span"])
            if isinstance(scenario, OpenLoop)
            else None,
        )
    loop = scenario if isinstance(scenario, OpenLoop) else None
    return ScenarioTimes(
        name=scenario.name,
        kind=scenario.kind,
        headline=scenario.headline,
        batch=scenario.batch,
        prompt=getattr(scenario, "prompt", 0),
        past=getattr(scenario, "past", 0),
        new_tokens=getattr(scenario, "new_tokens", 0),
        requests=loop.requests if loop else None,
        offered_per_second=loop.offered_per_second if loop else None,
        driver=loop.driver if loop else None,
        warmup=warmup,
        results=results,
    )


def _metric(name: str, samples: Sequence[float]) -> Metric:
    summary = statistics.summarise(samples)
    return Metric(
        unit="1/s" if name == "tokens_per_second" else "s",
        samples=tuple(samples),
        **asdict(summary),
    )


def _level(scenarios: Sequence[Scenario], subjects: int) -> float:
    """Confidence level of each interval of an A/A run, with Bonferroni's correction.

    All intervals together then miss at most as often as one interval of `statistics.LEVEL` does.
    """
    intervals = (subjects - 1) * sum(len(scenario.metrics) for scenario in scenarios)
    return 1 - (1 - statistics.LEVEL) / intervals


def _drifts(scenarios: Sequence[ScenarioTimes], baseline: str, rounds: int) -> list[str]:
    """Messages about the scenarios in which the baseline's times drifted."""
    found = []
    for scenario in scenarios:
        if scenario.kind == OpenLoop.kind:  # its arrivals differ from round to round
            continue
        headline = scenario.results[baseline].metrics[scenario.headline]
        moved = statistics.drift(headline.samples, rounds=rounds)
        if moved and moved.is_clear:
            found.append(
                f"{scenario.name}: {baseline} drifted by {moved.change:+.1%} from the first "
                f"third of the rounds to the last (limit {statistics.MOST_DRIFT:.0%})"
            )
    return found


def _differences(scenarios: Sequence[ScenarioTimes]) -> list[str]:
    """Messages about the ratios of an A/A run whose interval does not contain 1."""
    return [
        f"{scenario.name}: {metric} of {label} is {_shown(ratio)} times that of the same "
        "model, and the interval should contain 1"
        for scenario in scenarios
        for label, times in scenario.results.items()
        for metric, ratio in times.ratio.items()
        if 1.0 not in ratio
    ]


def _shown(ratio: Interval) -> str:
    return f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _environment(threads: int) -> BenchEnvironment:
    here = environment.describe()
    return BenchEnvironment(
        **{field.name: getattr(here, field.name) for field in fields(here)},
        threads=threads,
        governor=stillness.governor(),
        cpu_flags=tuple(stillness.arithmetic_flags()),
    )


def _machine(machine: Machine | None, still: Stillness) -> BenchMachine:
    return BenchMachine(
        machine.memory_bandwidth_bytes_per_second if machine else None,
        machine.gemm_flops_per_second if machine else {},
        **asdict(still),
    )


def _gpu(device: Monitor, readings: Sequence[nvml.Reading], held: nvml.Held | None) -> BenchGpu:
    clocks = [reading.clock_hz for reading in readings]
    power = [reading.power_watts for reading in readings if reading.power_watts is not None]
    return BenchGpu(
        name=device.name,
        clock_hz=(min(clocks), max(clocks)),
        power_watts=(min(power), max(power)) if power else None,
        throttle_reasons=tuple(
            sorted({name for reading in readings for name in reading.throttle_reasons})
        ),
        memory_of_all_models=held,
    )
