"""Bring the tokens of answers from the batcher's thread to the event loop, and decode them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from runtime.batching import Batcher, End, Finish, Request, Ticket, Token
from runtime.server.errors import RefusedError, too_late
from runtime.server.metrics import Metrics
from runtime.server.schemas import FinishReason
from runtime.text import Decoder, StopStrings, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of one answer.

    Attributes:
        index: index of the answer.
        text: the new text; it may be empty in the last piece.
        tokens: the tokens since the last piece.
        finish: why the answer ends with this piece; None if it does not.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None


class Answers:
    """The answers to one HTTP request, piece by piece, in the order in which the pieces are made.

    On exit from its context, unfinished answers are cancelled, which frees their slots.

    Attributes:
        prompt_tokens: number of tokens of all prompts, each counted once.
        completion_tokens: number of tokens of all answers so far.
    """

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request | None],
        *,
        arrived: float,
        echoed: Sequence[Sequence[Token]] = (),
        prompt_tokens: int,
        stop: Sequence[str],
        metrics: Metrics,
    ) -> None:
        """Submit the requests to the batcher, all of them or none.

        Args:
            batcher: generates the answers.
            tokenizer: decodes their tokens.
            prompts: the ids of each answer's prompt.
            requests: the request for each answer; None for an answer without tokens.
            arrived: time at which the HTTP request came, on the clock `time.monotonic`.
            echoed: the tokens of each answer's prompt, if the answer is to begin with the prompt.
            prompt_tokens: number of tokens of all prompts, each counted once.
            stop: texts that end an answer.
            metrics: records the times at which tokens come.

        Raises:
            Busy: the batcher's queue has no room for all requests.
            UsageError: the engine cannot read a prompt.
        """
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self._metrics = metrics
        self._arrived = arrived
        self._news: asyncio.Queue[tuple[int, Token | End]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._last: list[float | None] = [None] * len(requests)
        self._writers = [
            _Writer(index, tokenizer, prompt, stop, request.min_tokens if request else 0)
            for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]
        self._first = [
            Piece(index, tokenizer.decode(prompt, specials=True), tuple(tokens), None)
            for index, (prompt, tokens) in enumerate(zip(prompts, echoed, strict=bool(echoed)))
        ]
        self._empty = [index for index, request in enumerate(requests) if request is None]
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(requests):

                def deliver(news: Token | End, index: int = index) -> None:
                    with suppress(RuntimeError):  # the event loop has ended, so nobody waits
                        loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

                if request is not None:
                    self._tickets[index] = batcher.submit(request, deliver, owner=self)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Cancel all unfinished answers."""
        for ticket in self._tickets.values():
            ticket.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_up()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all answers, until the last answer is finished.

        Raises:
            RefusedError: an answer cannot be finished: its deadline passed, its form cannot be
                followed, the engine failed, or the server is shutting down.
        """
        for piece in self._first:
            yield piece
        for index in self._empty:
            yield Piece(index, "", (), "length")
        unfinished = set(self._tickets)
        while unfinished:
            index, news = await self._news.get()
            if index not in unfinished:  # it ended with a stop string
                continue
            if isinstance(news, Token):
                self._count(index)
            piece = self._writers[index].write(news)
            if piece.finish:
                unfinished.discard(index)
                self._tickets[index].cancel()
                self._metrics.answered(time.monotonic() - self._arrived)
            if piece.text or piece.finish:
                yield piece

    async def whole(self) -> list[Piece]:
        """Return every answer as one piece.

        Raises:
            RefusedError: as `pieces`.
        """
        parts: list[list[Piece]] = [[] for _ in self._writers]
        async for piece in self.pieces():
            parts[piece.index].append(piece)
        return [
            Piece(
                index,
                "".join(piece.text for piece in answer),
                tuple(token for piece in answer for token in piece.tokens),
                answer[-1].finish,
            )
            for index, answer in enumerate(parts)
        ]

    def _count(self, index: int) -> None:
        self.completion_tokens += 1
        now, last = time.monotonic(), self._last[index]
        if last is None:
            self._metrics.first_token.observe(now - self._arrived)
        else:
            self._metrics.between_tokens.observe(now - last)
        self._last[index] = now


class _Writer:
    """Turns the tokens of one answer into pieces."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        min_tokens: int,
    ) -> None:
        self._index = index
        self._decoder = Decoder(tokenizer, prompt)
        self._stop = StopStrings(stop)
        self._unstoppable = min_tokens  # tokens left in which stop strings do not count
        self._tokens: list[Token] = []

    def write(self, news: Token | End) -> Piece:
        """Return the piece that is certain now; its text is empty while text is held back.

        Raises:
            RefusedError: the answer cannot be finished.
        """
        finish: FinishReason | None = None
        if isinstance(news, Token):
            self._tokens.append(news)
            self._unstoppable -= 1
            text = self._decoder.push(news.id)
            if self._unstoppable < 0:
                text = self._stop.push(text)
        else:
            finish = _reason(news)
            text = self._stop.push(self._decoder.finish()) + self._stop.finish()
        if self._stop.found:
            finish = "stop"
        if not text and not finish:
            return Piece(self._index, "", (), None)
        tokens, self._tokens = tuple(self._tokens), []
        return Piece(self._index, text, tokens, finish)


def _reason(end: End) -> FinishReason:
    match end.reason:
        case Finish.STOP:
            return "stop"
        case Finish.LENGTH:
            return "length"
        case Finish.DEADLINE:
            raise too_late("the answer was not finished before the deadline")
        case Finish.REFUSED:
            raise RefusedError(400, str(end.error), code="form")
        case Finish.CLOSED:
            raise RefusedError(503, "the server is shutting down", code="closing")
        case _:
            raise RefusedError(500, "the engine failed", code="engine_failed")
