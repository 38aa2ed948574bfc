"""What is asked of a batcher, and what it delivers."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.sampling import GREEDY, Sampling
from thanos_deploy.errors import UsageError


class Constraint(Protocol):
    """The form that one text has to have; it goes along with the tokens of that text."""

    def allowed(self) -> NDArray[np.bool_]:
        """bool[vocabulary], which tokens may be next, those that end the text included.

        Raises:
            UsageError: the form cannot be kept to.
        """

    def take(self, token: int) -> None:
        """This one is next; see `allowed`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: its ids, at least one.
        new_tokens: the most tokens to generate, at least 1; fewer where the engine takes no longer
            sequences.
        sampling: how to choose.
        stop: ids that end the text; they are not delivered.
        deadline: of `time.monotonic()`; from the next step after it the request is given up.
        alternatives: how many of the likeliest tokens are reported beside each; None to compute no
            log probabilities.
        bias: added to the logits of these ids.
        min_tokens: before so many tokens, none of `stop` is chosen.
        constraint: the form of the text; None for any.

    Raises:
        UsageError: a value is out of its range.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()
    deadline: float | None = None
    alternatives: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("new_tokens", self.new_tokens, 1),
            ("alternatives", self.alternatives or 0, 0),
            ("min_tokens", self.min_tokens, 0),
        ):
            if value < least:
                raise UsageError(f"{name} {value}: out of range", fix=f"give at least {least}")


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of a text.

    Attributes:
        id: the token.
        logprob: the natural logarithm of its probability in the model's distribution, before
            temperature, penalties and cut-offs; None if it was not asked for.
        alternatives: the likeliest tokens, most likely first, and their logprobs.
    """

    id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()


class Finish(enum.Enum):
    """Why a text ended."""

    STOP = "a token ended the text"
    LENGTH = "the text reached the requested length, or the engine's longest"
    CANCELLED = "cancelled"
    DEADLINE = "its deadline passed"
    FAILED = "the engine failed"
    REFUSED = "the requested form of the answer cannot be followed"
    CLOSED = "the batcher closed"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a request.

    Attributes:
        reason: why.
        error: what the engine said, with FAILED, or what is wrong with the form, with REFUSED.
    """

    reason: Finish
    error: str | None = None


# Called on the batcher's thread, so it must not block. The last call of a request, and only that
# one, brings an End. A request whose callback raises is cancelled.
Deliver = Callable[[Token | End], None]
