"""The record of a benchmark run in a bundle: the measurements, the models and the machine.

A file has the whole run with its raw samples; the manifest has the run without them.
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

# The labels of a bundle's model, and of the dense model that it was made from, in a comparison.
PRUNED = "pruned"
DENSE = "dense"

# ONNX Runtime's name of the CPU provider.
CPU_PROVIDER = "CPUExecutionProvider"

Status = Literal["VALID", "INVALID", "INTERRUPTED"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval, from `low` to `high`, at confidence `level`."""

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
        bytes: bytes moved to and from memory.
        flops: floating-point operations.
        seconds: lower bound of the time, at the machine's measured bandwidth and peak arithmetic.
        bound: "memory" or "compute", whichever takes more of these seconds.
    """

    bytes: int
    flops: int
    seconds: float
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The samples of one metric, of one model in one scenario.

    Attributes:
        unit: unit of the samples: seconds, or per second.
        samples: raw samples in the order in which they were taken; empty in a manifest.
        count: number of samples.
        median, p90, p99: median, 90th and 99th percentile of the samples.
    """

    unit: Literal["s", "1/s"]
    samples: tuple[float, ...] = field(default=(), metadata=LATER)
    count: int
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """The results of one model in one scenario.

    Attributes:
        metrics: the metrics by name.
        ratio: by metric, the model's median divided by the baseline's; empty for the baseline
            itself, and if there was only one round.
        ceiling: lower bound of the headline metric's time; None if it is unknown.
        of_ceiling: the ceiling's seconds divided by the measured median of the headline metric; 1
            would be as fast as possible.
        achieved_per_second: answered requests per second in an open loop; otherwise None.
    """

    metrics: Mapping[str, Metric]
    ratio: Mapping[str, Interval] = field(default_factory=dict, metadata=LATER)
    ceiling: Ceiling | None = None
    of_ceiling: float | None = None
    achieved_per_second: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class WarmUpRecord:
    """The warm-up of a scenario.

    Attributes:
        rounds: number of rounds.
        stable: whether in the last round no engine was clearly faster than in all rounds before.
    """

    rounds: int
    stable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTimes:
    """The results of all models in one scenario.

    Attributes:
        name, kind, headline: those of the scenario; see `latency`.
        batch, prompt, past, new_tokens: sizes of the scenario, 0 for a size that it does not have.
        requests, offered_per_second, driver: see `latency.OpenLoop`; None for other scenarios.
        warmup: the warm-up before the first round.
        results: results by label of the model.
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
        model, sha256: name and hash of the base model.
        pattern, method: the sparsity pattern and the pruning method; None for a dense model.
        dtype: dtype of the exported graph.
        file_bytes: bytes of the graph's files, weights included.
        cache_bytes_per_token: bytes of KV cache for each token of a sequence.
        load_seconds: seconds from the start of loading until ready, hashing included.
        load_peak_bytes: peak resident memory of the process until then.
        steady_bytes: resident memory after the work; None if it is unknown.
        peak_bytes: peak resident memory of the process; None if it is unknown.
        gpu_peak_bytes: peak GPU memory; None if it is not known for this model alone.
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
    """The software and the machine of a run; see `Environment` for the other attributes.

    Attributes:
        threads: threads that computed on a CPU; None if it was not recorded.
        governor: Linux frequency governor of the CPU; None if it is unknown.
        cpu_flags: vector and matrix extensions of the processor.
    """

    threads: int | None = None
    governor: str | None = None
    cpu_flags: tuple[str, ...] = ()

    @property
    def computing_threads(self) -> int:
        """The recorded number of threads, or else one per core."""
        return self.threads or self.cores


@dataclass(frozen=True, slots=True)
class BenchMachine:
    """The peak speed of the machine, and how undisturbed it was during the run.

    Attributes:
        memory_bandwidth_bytes_per_second: bandwidth of reading as much memory as the graph has
            weights; None if it was not measured.
        gemm_flops_per_second: speed of a matrix product, by kind of arithmetic; empty if it was not
            measured.
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
        name: product name of the GPU.
        clock_hz: lowest and highest clock.
        power_watts: lowest and highest power draw; None if the GPU does not report it.
        throttle_reasons: why its clock was lower than it could be.
        memory_of_all_models: peak GPU memory of all models together; None if it is unknown.
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
        format: version of the record's format.
        run: name of the run.
        status: whether the measured times count.
        reasons: why they do not count; empty for a valid run.
        backend, provider: the backend and the execution provider that ran the models.
        baseline: label of the model to which ratios are.
        rounds: number of complete rounds.
        request: the user's options.
        environment, machine, gpu: what the run was measured on; `gpu` is None without a GPU.
        subjects: the models by label, the baseline first.
        scenarios: the results of each scenario.
        owner: the bundle that the run is from, if it is shown in the report of another bundle.
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
        """Refuse an inconsistent record.

        Raises:
            ValueError: there are results of a model that is not one of the subjects, or a ratio
                without the times of both the model and the baseline.
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
        """Whether the models ran on the CPU."""
        return self.provider == CPU_PROVIDER

    @property
    def processor(self) -> str:
        """Name of the processor that ran the models: a CPU or a GPU."""
        if self.on_cpu:
            return self.environment.processor
        return self.gpu.name if self.gpu else "a GPU of unknown name"

    @property
    def ratios(self) -> Iterator[tuple[ScenarioTimes, str, Interval]]:
        """Every ratio of the pruned model, with its scenario and the name of its metric."""
        for scenario in self.scenarios:
            if PRUNED in scenario.results:
                for metric, ratio in scenario.results[PRUNED].ratio.items():
                    yield scenario, metric, ratio

    @property
    def without_samples(self) -> "Run":
        """The run without raw samples, for the manifest and for reports."""
        return replace(self, scenarios=tuple(map(_without_samples, self.scenarios)))


@dataclass(frozen=True, slots=True)
class Sample:
    """The texts that models wrote after the same prompt.

    Attributes:
        prompt: the prompt.
        texts: the text of each model, by label.
    """

    prompt: str
    texts: Mapping[str, str] = field(default_factory=dict, metadata=OTHERS)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The result of the stage bench.

    Attributes:
        runs: runs by name, in the order in which they were measured, without raw samples.
        sample: the texts that the models wrote.
    """

    runs: Mapping[str, Run]
    sample: Sample


# The options map the name of each run to its request. The inputs map the name of each run to a map
# from the label of each model to the hashes of its graph's files.
BENCH: Stage[dict[str, BenchRequest], dict[str, dict[str, dict[str, str]]], BenchResult] = Stage(
    layout.BENCH, dict[str, BenchRequest], dict[str, dict[str, dict[str, str]]], BenchResult
)


def has_named_runs(bundle: Bundle) -> bool:
    """Whether a bundle has finished runs with names.

    Runs of old versions, which had no names, are ignored.
    """
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
