"""The metrics for Prometheus: requests, slots, tokens, and waiting times."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.batching import Batcher

# Buckets in seconds, from a step of a small model on a GPU to an answer of a large one on a CPU.
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_ANSWERS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """The metrics of one server.

    Attributes:
        registry: the registry that is exposed; not the library's global one.
        requests: number of requests, by route and status.
        first_token: seconds from the arrival of a request to the first token of an answer.
        between_tokens: seconds from each token of an answer to the next.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "thanos_requests", "HTTP requests", ["route", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "thanos_time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer",
            registry=self.registry,
            buckets=_ANSWERS,
        )
        self.between_tokens = Histogram(
            "thanos_time_between_tokens_seconds",
            "From each token of an answer to the next",
            registry=self.registry,
            buckets=_STEPS,
        )
        self._answers = Histogram(
            "thanos_answer_seconds",
            "From the arrival of a request to the end of an answer",
            registry=self.registry,
            buckets=_ANSWERS,
        )
        self._answered = 0
        self._seconds = 0.0
        self.registry.register(_Batching(batcher))
        ProcessCollector(registry=self.registry)

    def answered(self, seconds: float) -> None:
        """Record a finished answer, and the seconds since its request arrived."""
        self._answers.observe(seconds)
        self._answered += 1
        self._seconds += seconds

    @property
    def mean_answer_seconds(self) -> float:
        """Mean time of the answers so far, in seconds; 0 before the first answer."""
        return self._seconds / self._answered if self._answered else 0.0


class _Batching(Collector):
    """The state of the batcher, read at every scrape."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[Metric]:
        state = self._batcher.state()
        yield GaugeMetricFamily("thanos_queue", "Requests that wait for a slot", state.waiting)
        yield GaugeMetricFamily("thanos_active_slots", "Slots in use", state.active)
        yield GaugeMetricFamily("thanos_slots", "Total number of slots", state.slots)
        yield CounterMetricFamily("thanos_steps", "Steps of the batch", state.steps)
        yield CounterMetricFamily("thanos_prompt_tokens", "Tokens of prompts", state.prompt_tokens)
        yield CounterMetricFamily(
            "thanos_reused_prompt_tokens",
            "Tokens of prompts whose KV cache was reused from earlier prompts",
            state.reused_tokens,
        )
        yield CounterMetricFamily("thanos_tokens", "Tokens generated", state.tokens)
