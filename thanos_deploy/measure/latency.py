"""The scenarios of a benchmark. Each takes one turn at a time and returns raw samples.

    prefill    one batch of prompts                        prefill
    decode     some steps after a given past               decode, one for each step
    generate   prompts and answers, as their users see it  ttft, inter_token, total and
                                                           tokens_per_second
    open-loop  requests that come when they like, whether  ttft and request, counted from the
               or not the engine is ready (`load`)         moment a request was due; and span, that
                                                           of the whole turn

All samples are seconds but tokens_per_second. The `headline` of a scenario is the metric that
stands for it. Which tokens they are does not matter for the time a
dense transformer takes, so prompts are token 0 throughout, and answers are greedy.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtime.engine import Engine
from runtime.generate import generate_batch
from thanos_deploy.measure import traffic

# Metric -> raw samples in the order in which they were taken.
Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read a batch of prompts.

    Attributes:
        batch: sequences at once.
        prompt: tokens of each.
    """

    kind: ClassVar[str] = "prefill"
    metrics: ClassVar[tuple[str, ...]] = ("prefill",)
    headline: ClassVar[str] = "prefill"

    batch: int
    prompt: int

    @property
    def name(self) -> str:
        """Unique among scenarios."""
        return f"{self.kind}-{self.batch}x{self.prompt}"

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return self.prompt

    def take(self, engine: Engine, turn: int) -> Samples:
        """One turn: one prefill."""
        started = time.perf_counter()
        engine.prefill(np.zeros((self.batch, self.prompt), dtype=np.int64))
        return {"prefill": [time.perf_counter() - started]}


@dataclass(frozen=True, slots=True)
class Decode:
    """Append tokens one by one to sequences that are there already.

    Attributes:
        batch: sequences at once.
        past: tokens of each before the first step.
        new_tokens: steps.
    """

    kind: ClassVar[str] = "decode"
    metrics: ClassVar[tuple[str, ...]] = ("decode",)
    headline: ClassVar[str] = "decode"

    batch: int
    past: int
    new_tokens: int

    @property
    def name(self) -> str:
        """Unique among scenarios."""
        return f"{self.kind}-{self.batch}x{self.past}"

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return self.past + self.new_tokens

    def take(self, engine: Engine, turn: int) -> Samples:
        """One turn: the past, which is not timed, and all steps."""
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
    """Answer a batch of prompts, with everything that `runtime.generate` does on the way.

    Attributes:
        batch: sequences at once.
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
        """Unique among scenarios."""
        return f"{self.kind}-{self.size}"

    @property
    def size(self) -> str:
        """Sequences, tokens of each prompt and of each answer."""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}"

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return self.prompt + self.new_tokens

    def take(self, engine: Engine, turn: int) -> Samples:
        """One turn: one batch of answers."""
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
    """Serve requests one after the other while they arrive at random.

    Attributes:
        prompt: tokens of each prompt.
        new_tokens: tokens of each answer.
        requests: in one turn, which begins with an idle engine.
        offered_per_second: mean rate of arrival; None until it has been found out what the engines
            can take.
        driver: what makes the requests and times them; one of `traffic.DRIVERS`.
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
        """Unique among scenarios."""
        return f"{self.kind}-{self.unloaded.size}"

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return self.unloaded.tokens

    @property
    def unloaded(self) -> Generate:
        """The work of one request."""
        return Generate(self.batch, self.prompt, self.new_tokens)

    def take(self, engine: Engine, turn: int) -> Samples:
        """One turn; the same turn has the same arrivals, whatever the engine."""
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
