"""The model that is served, and the limits of a request."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request as HttpRequest

from runtime.batching import Batcher, Request, Token
from runtime.engine import ServingEngine
from runtime.grammars import Grammar
from runtime.server.answer_options import AnswerOptions
from runtime.server.answers import Answers
from runtime.server.chat import Renderer
from runtime.server.compiler import Compiler
from runtime.server.errors import RefusedError
from runtime.server.forward import Forward
from runtime.server.metrics import Metrics
from runtime.server.watched import Watched
from runtime.text import Tokenizer

# Most log probabilities in one response: some 50 MB of JSON.
_LOGPROBS = 400_000

# The token ids of one prompt.
Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request, and of the connections to the server.

    Attributes:
        answers: largest number of answers to all prompts of a request together.
        new_tokens: largest number of tokens of an answer; None for as many as the model takes.
        body_bytes: largest size of the body.
        deadline_seconds: longest time from the arrival of the request to the end of the answer.
        connections: largest number of connections at the same time; see
            `runtime.server.connections`.
        tensor_tokens: largest number of ids of one request for logits, over its whole batch; None
            for as many as the slots take.
    """

    answers: int
    new_tokens: int | None
    body_bytes: int
    deadline_seconds: float
    connections: int = 512
    tensor_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """One model behind HTTP.

    Attributes:
        names: names of the model for clients; the first one is its main name.
        engine: the engine that holds the model.
        batcher: generates text.
        forward: computes logits, and the log probabilities of prompts.
        tokenizer: the tokenizer of the same bundle.
        renderer: renders conversations; None if the model has no chat template.
        compiler: compiles the grammars that answers must follow.
        watched: the files that are mapped into memory while the server runs.
        limits: the limits of a request.
        metrics: the metrics of the server.
        log_prompts: write prompts and answers to the log.
        started: start of the service, in seconds of Unix time.
    """

    names: tuple[str, ...]
    engine: ServingEngine
    batcher: Batcher
    forward: Forward
    tokenizer: Tokenizer
    renderer: Renderer | None
    compiler: Compiler
    limits: Limits
    metrics: Metrics
    watched: Watched = field(default_factory=Watched)
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def require(self, model: str) -> None:
        """Refuse a request for another model.

        Raises:
            RefusedError: the served model has no such name.
        """
        if model not in self.names:
            raise RefusedError(
                404,
                f"The model {model!r} does not exist; this server has "
                f"{' and '.join(map(repr, self.names))}",
                code="model_not_found",
                param="model",
            )

    def require_ready(self) -> None:
        """Report that the server is not ready if the served model is no longer the one on disk.

        Raises:
            RefusedError: a file that is mapped into memory has changed.
        """
        if (path := self.watched.changed()) is not None:
            raise RefusedError(
                503,
                f"{path.name} has changed since it was loaded: restart the server",
                code="changed_on_disk",
            )

    @property
    def name(self) -> str:
        """The main name of the model."""
        return self.names[0]

    def answer(
        self,
        prompts: Sequence[Prompt],
        options: AnswerOptions,
        *,
        arrived: float,
        echoed: Sequence[Sequence[Token]] = (),
        grammar: Grammar | None = None,
    ) -> Answers:
        """Submit the answers to a request to the batcher.

        Args:
            prompts: the ids of each prompt, at least one; see `require_prompts`.
            options: the options of the request.
            arrived: time at which the request came, on the clock `time.monotonic`.
            echoed: the tokens of each prompt, if its answers are to begin with them.
            grammar: the grammar that every answer must follow; None for any text.

        Raises:
            RefusedError: the request asks for more than the limits or the model allow.
            Busy: the batcher's queue is full.
            UsageError: the engine cannot read a prompt.
        """
        self.require_prompts(prompts, options)
        wanted = [self._new_tokens(len(prompt), options) for prompt in prompts]
        requests = [
            Request(
                prompt,
                most,
                sampling=replace(options.sampling, seed=options.sampling.seed + copy),
                stop=self._stop(options, grammar),
                deadline=arrived + self.limits.deadline_seconds,
                alternatives=options.alternatives,
                bias=options.bias,
                min_tokens=min(options.min_tokens, most),
                constraint=None if grammar is None else grammar.begin(),
            )
            if most
            else None
            for prompt, most in zip(prompts, wanted, strict=True)
            for copy in range(options.copies)
        ]
        return Answers(
            self.batcher,
            self.tokenizer,
            [prompt for prompt in prompts for _ in range(options.copies)],
            requests,
            arrived=arrived,
            echoed=[tokens for tokens in echoed for _ in range(options.copies)],
            prompt_tokens=sum(map(len, prompts)),
            stop=options.stop,
            metrics=self.metrics,
        )

    def require_prompts(self, prompts: Sequence[Prompt], options: AnswerOptions) -> None:
        """Refuse a request that exceeds the limits or that the model cannot answer.

        Raises:
            RefusedError: the request asks for more than the limits or the model allow.
        """
        answers = len(prompts) * options.copies
        if answers > self.limits.answers:
            raise RefusedError(
                400,
                f"the request asks for {answers} answers; this server gives at most "
                f"{self.limits.answers} at a time",
                code="too_many_answers",
                param="n",
            )
        self.require_ids(options.bias, "logit_bias")
        self.require_ids(options.stop_ids, "stop_token_ids")
        for prompt in prompts:
            if not prompt:
                raise RefusedError(400, "the prompt is empty", code="invalid", param="prompt")
            self.require_ids(prompt, "prompt")
        tokens = sum(self._new_tokens(len(prompt), options) for prompt in prompts) * options.copies
        if options.echo:
            tokens += sum(map(len, prompts)) * options.copies
        alternatives = options.alternatives
        if alternatives is not None and tokens * (1 + alternatives) > _LOGPROBS:
            raise RefusedError(
                400,
                f"{tokens} tokens with {alternatives} alternatives each: this server gives at most "
                f"{_LOGPROBS} log probabilities at a time",
                code="too_many_logprobs",
                param="logprobs",
            )

    def require_ids(self, ids: Iterable[int], field: str) -> None:
        """Refuse ids that are outside of the vocabulary.

        Raises:
            RefusedError: an id is outside of the vocabulary.
        """
        vocabulary = self.engine.vocabulary
        outside = next((token for token in ids if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise RefusedError(
                400,
                f"{field}: the token id {outside} is outside of the vocabulary, whose ids are 0 to "
                f"{vocabulary - 1}",
                code="invalid",
                param=field,
            )

    def _stop(self, options: AnswerOptions, grammar: Grammar | None) -> frozenset[int]:
        # Only the model's own ids can end an answer whose grammar is complete.
        if options.ignore_eos and grammar is None:
            return options.stop_ids
        return options.stop_ids | self.tokenizer.stop

    def retry_after(self) -> int:
        """Estimate the seconds until a slot becomes free, at least 1."""
        return max(1, math.ceil(self.metrics.mean_answer_seconds / self.engine.slots))

    def _new_tokens(self, prompt: int, options: AnswerOptions) -> int:
        """Return the largest number of tokens of an answer to a prompt of `prompt` tokens."""
        wanted, usual = options.new_tokens, options.usual_tokens
        # The last token is never fed back to the engine.
        room = self.engine.max_sequence - prompt + 1
        if room < (1 if wanted is None else wanted):
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
        return min(usual or most, most) if wanted is None else wanted


def _served(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


# The type of a parameter of a route to which FastAPI passes the service.
Served = Annotated[Service, Depends(_served)]
