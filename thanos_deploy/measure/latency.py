"""The scenarios of a benchmark. Each takes one turn at a time and returns raw samples.

    Scenario   One turn                                Samples
    prefill    one batch of prompts                    prefill
    decode     some decode steps after a given past    decode, one for each step
    generate   a batch of prompts and their answers    ttft, inter_token, total and
                                                       tokens_per_second
    open-loop  requests that arrive at random times,   ttft and request, both counted from the
               whether or not the engine is ready      time at which a request was due; span, the
               (see `traffic`)                         duration of the whole turn

Samples are in seconds, except tokens_per_second. The `headline` of a scenario is the metric that
represents it where only one is shown. The time of a dense transformer does not depend on which
tokens it reads, so prompts consist of token 0 only; answers are greedy.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtime.engine import Engine
from runtime.generate import generate_batch
from thanos_deploy.measure import traffic

# Metric -> raw samples, in the order in which they were taken.
Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill a batch of prompts.

    Attributes:
        batch: number of sequences.
        prompt: tokens of each prompt.
    """

    kind: ClassVar[str] = "prefill"
    metrics: ClassVar[tuple[str, ...]] = ("prefill",)
    headline: ClassVar[str] = "prefill"

    batch: int
    prompt: int

    @property
    def name(self) -> str:
        """A name that no other scenario of a run has."""
        return f"{self.kind}-{self.batch}x{self.prompt}"

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self.prompt

    def take(self, engine: Engine, turn: int) -> Samples:
        """Take one turn: one prefill."""
        started = time.perf_counter()
        engine.prefill(np.zeros((self.batch, self.prompt), dtype=np.int64))
        return {"prefill": [time.perf_counter() - started]}


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode some tokens one by one, after a prefill that is not timed.

    Attributes:
        batch: number of sequences.
        past: tokens of each sequence before the first decode step.
        new_tokens: number of decode steps.
    """

    kind: ClassVar[str] = "decode"
    metrics: ClassVar[tuple[str, ...]] = ("decode",)
    headline: ClassVar[str] = "decode"

    batch: int
    past: int
    new_tokens: int

    @property
    def name(self) -> str:
        """A name that no other scenario of a run has."""
        return f"{self.kind}-{self.batch}x{self.past}"

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self.past + self.new_tokens

    def take(self, engine: Engine, turn: int) -> Samples:
        """Take one turn: an untimed prefill of the past, then all decode steps."""
        logits = engine.prefill(np.zeros((self.batch, self.past), dtype=np.int64))
        seconds = []
        for _ in range(self.new_tokens):
            ids = logits.argmax(axis=1)
            started = time.perf_counter()
            logits = engine.decode(ids)
            seconds.append(time.perf_counter() - started)
        return {"decode": seconds}


@dataclass(frozen=True, slots=True)
class Generate:
    """Answer a batch of prompts with `runtime.generate`, whose own work is timed too.

    Attributes:
        batch: number of sequences.
        prompt: tokens of each prompt.
        new_tokens: tokens of each answer.
    """

    kind: ClassVar[str] = "generate"
    metrics: ClassVar[tuple[str, ...]] = ("ttft", "inter_token", "total", "tokens_per_second")
    headline: ClassVar[str] = "total"

    batch: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        """A name that no other scenario of a run has."""
        return f"{self.kind}-{self.size}"

    @property
    def size(self) -> str:
        """The number of sequences, and the tokens of each prompt and answer, such as "1x128+16"."""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}"

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self.prompt + self.new_tokens

    def take(self, engine: Engine, turn: int) -> Samples:
        """Take one turn: one batch of answers."""
        prompts = [[0] * self.prompt] * self.batch
        times = [time.perf_counter()]
        for _ in generate_batch(engine, prompts, new_tokens=self.new_tokens):
            times.append(time.perf_counter())
        total = times[-1] - times[0]
        first, *gaps = np.diff(times).tolist()
        return {
            "ttft": [first],
            "inter_token": gaps,
            "total": [total],
            "tokens_per_second": [self.batch * self.new_tokens / total],
        }


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Serve requests that arrive at random times, one after the other.

    Attributes:
        prompt: tokens of each prompt.
        new_tokens: tokens of each answer.
        requests: number of requests in one turn; every turn begins with an idle engine.
        offered_per_second: mean arrival rate in requests per second; None until it is derived from
            the baseline's time in the warm-up.
        driver: what makes the arrivals and takes the times; a key of `traffic.DRIVERS`.
    """

    kind: ClassVar[str] = "open-loop"
    metrics: ClassVar[tuple[str, ...]] = ("ttft", "request")
    headline: ClassVar[str] = "request"
    batch: ClassVar[int] = 1

    prompt: int
    new_tokens: int
    requests: int
    offered_per_second: float | None = None
    driver: str = "poisson"

    @property
    def name(self) -> str:
        """A name that no other scenario of a run has."""
        return f"{self.kind}-{self.unloaded.size}"

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self.unloaded.tokens

    @property
    def unloaded(self) -> Generate:
        """The work of one request, without waiting for arrivals."""
        return Generate(self.batch, self.prompt, self.new_tokens)

    def take(self, engine: Engine, turn: int) -> Samples:
        """Take one turn; its arrivals depend on the turn's number only, not on the engine."""
        assert self.offered_per_second is not None
        prompts = [[0] * self.prompt]
        served = traffic.DRIVERS[self.driver](
            lambda: generate_batch(engine, prompts, new_tokens=self.new_tokens),
            requests=self.requests,
            per_second=self.offered_per_second,
            seed=turn,
        )
        return {
            "ttft": [request.first_token - request.due for request in served],
            "request": [request.finished - request.due for request in served],
            "span": [served[-1].finished],
        }


Scenario = Prefill | Decode | Generate | OpenLoop

KINDS = {scenario.kind: scenario for scenario in (Prefill, Decode, Generate, OpenLoop)}
