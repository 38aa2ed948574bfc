"""The model that is served, and the limits of a request."""

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request as HttpRequest

from runtime.batching import Batcher, Busy, Request
from runtime.engine import Ids, Logits, ServingEngine
from runtime.sampling import Sampling
from runtime.server.answers import Answers
from runtime.server.chat import Renderer
from runtime.server.errors import RefusedError
from runtime.server.metrics import Metrics
from runtime.text import Tokenizer

# Of one response: that many are some 50 MB of JSON.
_LOGPROBS = 400_000

# Ids of one.
Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request.

    Attributes:
        answers: to its prompts, all together.
        new_tokens: the most tokens of an answer; None for what the model takes.
        body_bytes: of the body.
        deadline_seconds: from the arrival of the request to the last byte of the answer.
        connections: of clients at the same time; one more is answered 503 and closed.
        tensor_tokens: the most ids of one request for logits, its whole batch; None for as many as
            the slots take.
    """

    answers: int
    new_tokens: int | None
    body_bytes: int
    deadline_seconds: float
    connections: int = 512
    tensor_tokens: int | None = None


class Forward:
    """Forward passes beside the batch, one at a time; the others wait in line."""

    def __init__(self, engine: ServingEngine, *, queue: int) -> None:
        """Take requests.

        Args:
            engine: computes them.
            queue: the most that wait.
        """
        self._engine = engine
        self._room = threading.Semaphore(queue + 1)
        self._worker = ThreadPoolExecutor(1, "forward")
        self._closing = threading.Event()

    async def logits(self, ids: Ids, mask: Ids | None) -> Logits:
        """float32[batch, vocabulary], what follows the last tokens; see `Engine.prefill`.

        Raises:
            Busy: too many wait already.
            UsageError: the engine cannot read them.
        """
        if not self._room.acquire(blocking=False):
            raise Busy("too many requests wait for a forward pass", fix="try again later")
        gone = threading.Event()
        future = self._worker.submit(
            self._engine.logits, ids, mask, lambda: gone.is_set() or self._closing.is_set()
        )
        # Whoever gives up leaves the line at once, and the worker before its next piece.
        future.add_done_callback(lambda _: self._room.release())
        try:
            return await asyncio.wrap_future(future)
        finally:
            gone.set()

    def close(self) -> None:
        """Give up what runs."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Service:
    """One model behind HTTP.

    Attributes:
        name: of the model, as clients call it.
        engine: holds the model.
        batcher: what makes it answer.
        forward: what computes logits for whoever wants no text.
        tokenizer: of the same bundle.
        renderer: writes conversations down; None if the model has no chat template.
        limits: of a request.
        metrics: what is counted.
        log_prompts: texts may be written to the log.
        started: when, in seconds of Unix time.
    """

    name: str
    engine: ServingEngine
    batcher: Batcher
    forward: Forward
    tokenizer: Tokenizer
    renderer: Renderer | None
    limits: Limits
    metrics: Metrics
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def require(self, model: str) -> None:
        """Refuse a request for another model.

        Raises:
            RefusedError: it is not the one that is served.
        """
        if model != self.name:
            raise RefusedError(
                404,
                f"The model {model!r} does not exist; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        copies: int,
        new_tokens: int | None,
        usual_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        alternatives: int | None,
        ignore_eos: bool,
        arrived: float,
    ) -> Answers:
        """Begin to answer.

        Args:
            prompts: at least one.
            copies: answers to each, drawn with seeds that count up.
            new_tokens: the most for each answer; None for the usual.
            usual_tokens: fewer where there is less room; None for as many as there is room for.
            sampling: how to choose.
            stop: texts that end an answer.
            alternatives: log probabilities beside each token's; None for none.
            ignore_eos: go on after the token that ends a text.
            arrived: when the request did, on the clock `time.monotonic`.

        Raises:
            RefusedError: it asks for more than the limits or the model allow.
            Busy: there is no room now.
            UsageError: a prompt cannot be read.
        """
        if len(prompts) * copies > self.limits.answers:
            raise RefusedError(
                400,
                f"the request asks for {len(prompts) * copies} answers; this server gives at most "
                f"{self.limits.answers} at a time",
                code="too_many_answers",
                param="n",
            )
        deadline = arrived + self.limits.deadline_seconds
        for prompt in prompts:
            if not prompt or not 0 <= min(prompt) <= max(prompt) < self.engine.vocabulary:
                raise RefusedError(
                    400,
                    f"prompt: at least one id, and ids from 0 to {self.engine.vocabulary - 1}",
                    code="invalid",
                    param="prompt",
                )
        wanted = [self._new_tokens(len(prompt), new_tokens, usual_tokens) for prompt in prompts]
        if alternatives is not None and sum(wanted) * copies * (1 + alternatives) > _LOGPROBS:
            raise RefusedError(
                400,
                f"{sum(wanted) * copies} tokens with {alternatives} alternatives each: this server "
                f"gives at most {_LOGPROBS} log probabilities at a time",
                code="too_many_logprobs",
                param="logprobs",
            )
        requests = [
            Request(
                prompt,
                most,
                sampling=replace(sampling, seed=sampling.seed + copy),
                stop=frozenset() if ignore_eos else self.tokenizer.stop,
                deadline=deadline,
                alternatives=alternatives,
            )
            for prompt, most in zip(prompts, wanted, strict=True)
            for copy in range(copies)
        ]
        return Answers(
            self.batcher,
            self.tokenizer,
            requests,
            prompt_tokens=sum(map(len, prompts)),
            stop=stop,
            metrics=self.metrics,
        )

    def retry_after(self) -> int:
        """Seconds in which a slot is likely to become free, at least 1."""
        return max(1, math.ceil(self.metrics.mean_answer_seconds / self.engine.slots))

    def _new_tokens(self, prompt: int, wanted: int | None, usual: int | None) -> int:
        # The last token is not read any more.
        room = self.engine.max_sequence - prompt + 1
        if room < (wanted or 1):
            raise RefusedError(
                400,
                f"This model's maximum context length is {self.engine.max_sequence} tokens; the "
                f"prompt has {prompt}" + (f", and {wanted} are to be generated" if wanted else ""),
                code="context_length_exceeded",
                param="max_tokens" if wanted else None,
            )
        most = min(room, self.limits.new_tokens or room)
        if wanted and wanted > most:
            raise RefusedError(
                400,
                f"the request asks for {wanted} tokens; this server generates at most {most}",
                code="too_many_tokens",
                param="max_tokens",
            )
        return wanted or min(usual or most, most)


def _served(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


# What a route declares to be handed the service.
Served = Annotated[Service, Depends(_served)]
