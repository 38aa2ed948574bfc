"""A request that the batcher has taken, and the state of its text."""

import itertools
import logging
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from runtime.batching.logprobs import token_of
from runtime.batching.requests import Deliver, End, Finish, Request, Token
from runtime.sampling import Sampler

_NUMBERS = itertools.count()

_log = logging.getLogger(__name__)


class Ticket:
    """A handle to a request that was taken, with which it can be cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Cancel the request before its next step; no effect when it has ended."""
        self.cancelled = True


class Text:
    """A request that was taken, and the text generated for it so far."""

    def __init__(self, request: Request, deliver: Deliver, most: int, owner: Hashable) -> None:
        """Start without a token.

        Args:
            request: the prompt to continue, and how.
            deliver: called with every token, and then with the end.
            most: largest number of tokens after the prompt that the engine has room for.
            owner: see `Batcher.submit`; None for a request by itself.
        """
        self.request = request
        self.number = next(_NUMBERS)  # in the order of arrival
        self.owner: Hashable = self if owner is None else owner
        self.ticket = Ticket()
        self.last = 0
        self.end: End | None = None
        self._deliver = deliver
        self._left = min(request.new_tokens, most)
        self._generated = 0
        self._sampler = Sampler(request.sampling, request.prompt, bias=request.bias)

    def extend(self, logits: NDArray[np.float32]) -> bool:
        """Choose the next token and deliver it; return False if the text ends instead.

        Args:
            logits: float32[vocabulary].
        """
        if not np.isfinite(logits.max()):  # the maximum is NaN if any logit is
            self.end = End(Finish.FAILED, "the model's logits are not finite")
            return False
        self.last = self._sampler.choose(logits, self._allowed(len(logits)))
        if self.last in self.request.stop:
            self.end = End(Finish.STOP)
            return False
        if self.request.constraint is not None:
            self.request.constraint.take(self.last)
        self._generated += 1
        self._left -= 1
        if not self._left:
            self.end = End(Finish.LENGTH)
        self._tell(token_of(self.last, logits, self.request.alternatives))
        return True

    def _allowed(self, vocabulary: int) -> NDArray[np.bool_] | None:
        """Return bool[vocabulary], the tokens that may come next; None if all of them may."""
        constraint = self.request.constraint
        allowed = None if constraint is None else constraint.allowed()
        if self._generated >= self.request.min_tokens or not self.request.stop:
            return allowed
        longer = np.ones(vocabulary, bool) if allowed is None else allowed.copy()
        longer[list(self.request.stop)] = False
        # If the constraint allows nothing but the end, the text ends before `min_tokens`.
        return longer if longer.any() else allowed

    def give_up(self, now: float, *, closed: bool) -> None:
        """End the text if it was cancelled, is past its deadline, or the batcher has closed."""
        if self.end:
            return
        if self.ticket.cancelled:
            self.end = End(Finish.CANCELLED)
        elif self.request.deadline is not None and now >= self.request.deadline:
            self.end = End(Finish.DEADLINE)
        elif closed:
            self.end = End(Finish.CLOSED)

    def finish(self) -> None:
        """Deliver the end."""
        assert self.end
        self._tell(self.end)

    def _tell(self, news: Token | End) -> None:
        try:
            self._deliver(news)
        except Exception:
            _log.exception("a callback raised; its request is cancelled")
            self.ticket.cancel()
