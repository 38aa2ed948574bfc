"""A run of bench as it is kept in a bundle: what was measured of which models, on what.

The whole run, raw samples included, is a file; the manifest has it without them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import LATER, OTHERS
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage
from thanos_deploy.gpu.nvml import Held
from thanos_deploy.machine.environment import Environment
from thanos_deploy.measure.options import BenchRequest

FORMAT: Final = "thanos-deploy/bench/1"

# What a bundle and the model that it was made from are called where they are compared.
PRUNED = "pruned"
DENSE = "dense"

# What ONNX Runtime calls the provider that is no GPU.
CPU_PROVIDER = "CPUExecutionProvider"

Status = Literal["VALID", "INVALID", "INTERRUPTED"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval that holds the true value with a probability of `level`."""

    estimate: float
    low: float
    high: float
    level: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The shortest time that a scenario can take.

    Attributes:
        bytes: moved to and from memory.
        flops: floating point operations.
        seconds: at this machine's best.
        bound: "memory" or "compute", whichever most of the time goes to.
    """

    bytes: int
    flops: int
    seconds: float
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What was timed of one model in one scenario.

    Attributes:
        unit: of the values.
        samples: the raw ones, in the order in which they were taken; none in a manifest.
        count: how many there are.
        median, p90, p99: of the samples.
    """

    unit: Literal["s", "1/s"]
    samples: tuple[float, ...] = field(default=(), metadata=LATER)
    count: int
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """One model in one scenario.

    Attributes:
        metrics: by name.
        ratio: of the median over the baseline's, by metric; none for the baseline itself, and
            none where there was one round only.
        ceiling: the least that the headline can take; None where that is not known.
        of_ceiling: that over the median that was measured.
        achieved_per_second: requests that were answered, in an open loop.
    """

    metrics: Mapping[str, Metric]
    ratio: Mapping[str, Interval] = field(default_factory=dict, metadata=LATER)
    ceiling: Ceiling | None = None
    of_ceiling: float | None = None
    achieved_per_second: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class WarmUpRecord:
    """Turns that did not count.

    Attributes:
        rounds: how many there were.
        stable: the last one was not clearly faster than all before.
    """

    rounds: int
    stable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTimes:
    """All models in one scenario.

    Attributes:
        name, kind, headline: of the scenario; see `latency`.
        batch, prompt, past, new_tokens: its sizes, 0 for what it does not have.
        requests, offered_per_second, driver: of an open loop; else None.
        warmup: how it began.
        results: by label of the model.
    """

    name: str
    kind: str
    headline: str
    batch: int
    prompt: int
    past: int
    new_tokens: int
    requests: int | None = field(default=None, metadata=LATER)
    offered_per_second: float | None = field(default=None, metadata=LATER)
    driver: str | None = field(default=None, metadata=LATER)
    warmup: WarmUpRecord
    results: Mapping[str, ModelTimes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that was measured.

    Attributes:
        model, sha256: the base model's name and hash.
        pattern, method: what it was pruned to and by what; None for a dense model.
        dtype: of the graph.
        file_bytes: of the graph and its weights.
        cache_bytes_per_token: of the kv cache of one sequence.
        load_seconds: from the start of loading until ready, hashing included.
        load_peak_bytes: peak resident memory of the process until then.
        steady_bytes: resident memory after the work; None where nobody said.
        peak_bytes: the most there ever was; None likewise.
        gpu_peak_bytes: the most memory of a GPU; None where it is not known of this model alone.
    """

    model: str
    sha256: str
    pattern: str | None
    method: str | None
    dtype: str
    file_bytes: int
    cache_bytes_per_token: int
    load_seconds: float | None = None
    load_peak_bytes: int | None = None
    steady_bytes: int | None = None
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BenchEnvironment(Environment):
    """What a run was measured on.

    Attributes:
        threads: that computed on a CPU; None where it was not recorded.
        governor: what decided on the processors' clock; None where nobody says.
        cpu_flags: the processor's extensions for arithmetic.
    """

    threads: int | None = None
    governor: str | None = None
    cpu_flags: tuple[str, ...] = ()

    @property
    def computing_threads(self) -> int:
        """As many as were asked for, or one for each core."""
        return self.threads or self.cores


@dataclass(frozen=True, slots=True)
class BenchMachine:
    """How fast the machine is at best, and whether it held still.

    Attributes:
        memory_bandwidth_bytes_per_second: reading as much memory as the graph has weights; None
            where it was not measured.
        gemm_flops_per_second: of a matrix product, by kind of arithmetic.
        other_load, stolen, clock_hz, throttle_events: see `stillness.Stillness`.
    """

    memory_bandwidth_bytes_per_second: float | None
    gemm_flops_per_second: Mapping[str, float]
    other_load: float | None = None
    stolen: float | None = None
    clock_hz: tuple[float, float] | None = None
    throttle_events: int | None = None


@dataclass(frozen=True, slots=True)
class BenchGpu:
    """The GPU of a run.

    Attributes:
        name: its model.
        clock_hz: lowest and highest.
        power_watts: the same of what it drew; None where it does not say.
        throttle_reasons: why its clock was lower than it could be.
        memory_of_all_models: the most that they held together; None where nothing says.
    """

    name: str
    clock_hz: tuple[float, float]
    power_watts: tuple[float, float] | None
    throttle_reasons: tuple[str, ...]
    memory_of_all_models: Held | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run: VALID; INVALID with reasons; or INTERRUPTED, with the rounds that were complete.

    Attributes:
        format: of this record.
        run: its name.
        status: whether its times count.
        reasons: why they do not.
        backend, provider: what ran the models.
        baseline: the label that ratios are to.
        rounds: that were complete.
        request: what was asked for.
        environment, machine, gpu: what it was measured on; no GPU is None.
        subjects: the models by label, the baseline first.
        scenarios: what was measured of them.
        owner: the bundle that the run is from, where it is shown in the report of another one.
    """

    format: Literal["thanos-deploy/bench/1"] = FORMAT
    run: str
    owner: str | None = field(default=None, metadata=LATER)
    status: Status
    reasons: tuple[str, ...]
    backend: str
    provider: str
    baseline: str
    rounds: int
    request: BenchRequest
    environment: BenchEnvironment
    machine: BenchMachine
    gpu: BenchGpu | None = None
    subjects: Mapping[str, Subject]
    scenarios: tuple[ScenarioTimes, ...]

    def __post_init__(self) -> None:
        """Refuse times of models that the run does not have, and ratios of times that it lacks.

        Raises:
            ValueError: there are such.
        """
        for scenario in self.scenarios:
            if others := sorted(set(scenario.results) - set(self.subjects)):
                raise ValueError(
                    f"{scenario.name}: {others[0]!r} is not one of the models of the run"
                )
            for label, result in scenario.results.items():
                base = scenario.results.get(self.baseline)
                both = set(result.metrics) & set(base.metrics if base else ())
                if lacking := sorted(set(result.ratio) - both):
                    raise ValueError(f"{scenario.name}: no times of {label!r} for {lacking[0]!r}")

    @property
    def on_cpu(self) -> bool:
        """No GPU ran the models."""
        return self.provider == CPU_PROVIDER

    @property
    def processor(self) -> str:
        """What computed: a GPU, or the CPU."""
        if self.on_cpu:
            return self.environment.processor
        return self.gpu.name if self.gpu else "a GPU of unknown name"

    @property
    def ratios(self) -> Iterator[tuple[ScenarioTimes, str, Interval]]:
        """Scenario, name of the metric and the pruned model's ratio, for all that have one."""
        for scenario in self.scenarios:
            if PRUNED in scenario.results:
                for metric, ratio in scenario.results[PRUNED].ratio.items():
                    yield scenario, metric, ratio

    @property
    def without_samples(self) -> "Run":
        """The run for the manifest and for people."""
        return replace(self, scenarios=tuple(map(_without_samples, self.scenarios)))


@dataclass(frozen=True, slots=True)
class Sample:
    """The texts that models wrote.

    Attributes:
        prompt: what they went on from.
        texts: what each wrote, by label.
    """

    prompt: str
    texts: Mapping[str, str] = field(default_factory=dict, metadata=OTHERS)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What the stage bench reports.

    Attributes:
        runs: by name, in the order in which they were measured, without their raw samples.
        sample: what the models write.
    """

    runs: Mapping[str, Run]
    sample: Sample


# Options and inputs are of each run: its request with the labels of what was compared, and by label
# the hashes of the files of the graph.
BENCH: Stage[dict[str, BenchRequest], dict[str, dict[str, dict[str, str]]], BenchResult] = Stage(
    layout.BENCH, dict[str, BenchRequest], dict[str, dict[str, dict[str, str]]], BenchResult
)


def has_named_runs(bundle: Bundle) -> bool:
    """The stage bench is finished, and not from before runs had names; such a one is not read."""
    return bundle.has(BENCH) and "runs" in bundle.stages[BENCH.name].result


def _without_samples(scenario: ScenarioTimes) -> ScenarioTimes:
    results = {
        label: replace(
            times,
            metrics={name: replace(one, samples=()) for name, one in times.metrics.items()},
        )
        for label, times in scenario.results.items()
    }
    return replace(scenario, results=results)
