"""Time an engine: prefill as a whole, and every decoded token. Keeps raw samples."""

import time
from dataclasses import dataclass

import numpy as np

from runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed.

    Attributes:
        batch: sequences at once.
        prompt: tokens of each prompt.
        new_tokens: tokens decoded after each prompt.
    """

    batch: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class LatencySamples:
    """Raw seconds, in the order in which they were taken.

    Attributes:
        prefill_seconds: one per prompt batch.
        decode_seconds: one per decoded token.
    """

    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]

    def __add__(self, other: "LatencySamples") -> "LatencySamples":
        return LatencySamples(
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and tail of a set of samples, in seconds."""

    count: int
    median: float
    p90: float
    p99: float


def summarise(seconds: tuple[float, ...]) -> Summary:
    """Median, 90th and 99th percentile."""
    median, p90, p99 = np.percentile(seconds, [50, 90, 99])
    return Summary(len(seconds), float(median), float(p90), float(p99))


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast one engine is as another, over rounds in which they took turns."""

    median: float
    lowest: float
    highest: float
    rounds: int


def speedup(slow: tuple[float, ...], fast: tuple[float, ...], *, rounds: int) -> Speedup:
    """Compare two engines round by round, which takes out what changed from round to round.

    Args:
        slow: the samples that count as 1; as many in each round, in the order of the rounds.
        fast: the samples to compare with them, likewise.
        rounds: how many rounds the samples are from.
    """
    of_slow, of_fast = (np.reshape(seconds, (rounds, -1)).sum(axis=1) for seconds in (slow, fast))
    ratios = of_slow / of_fast
    return Speedup(float(np.median(ratios)), float(ratios.min()), float(ratios.max()), rounds)


def measure(engine: Engine, workload: Workload) -> LatencySamples:
    """Time one prefill and the decode steps after it.

    Which tokens they are does not matter for the time a dense transformer takes, so the prompt is
    token 0 throughout and every decoded token is the likeliest one, as in greedy generation.
    """
    prompt = np.zeros((workload.batch, workload.prompt), dtype=np.int64)
    started = time.perf_counter()
    logits = engine.prefill(prompt)
    prefill = time.perf_counter() - started
    decode = []
    for _ in range(workload.new_tokens):
        ids = logits.argmax(axis=1)
        started = time.perf_counter()
        logits = engine.decode(ids)
        decode.append(time.perf_counter() - started)
    return LatencySamples((prefill,), tuple(decode))
