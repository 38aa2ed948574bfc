"""The requests that a batcher takes, and the tokens and ends that it delivers."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.sampling import GREEDY, Sampling
from thanos_deploy.errors import UsageError


class Constraint(Protocol):
    """The required form of one text, such as a grammar; its state advances with every token."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return bool[vocabulary]: the tokens that may be next, those that end the text included.

        Raises:
            UsageError: the constraint cannot be followed any further.
        """

    def take(self, token: int) -> None:
        """Advance the state by a token, one that `allowed` permits."""


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: the ids of the prompt, at least one.
        new_tokens: largest number of tokens to generate, at least 1; fewer if the engine's longest
            sequence is reached.
        sampling: how to choose the tokens.
        stop: ids that end the text; they are not delivered.
        deadline: time of `time.monotonic()` after which the request ends at the next step; None for
            no deadline.
        alternatives: number of likeliest tokens that are reported beside each token; None to
            compute no log probabilities.
        bias: maps ids to values that are added to their logits.
        min_tokens: no id of `stop` is chosen before the text has this many tokens.
        constraint: the required form of the text; None for any text.

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
        reason: why the text ended.
        error: the engine's error with FAILED, or the constraint's error with REFUSED; None with any
            other reason.
    """

    reason: Finish
    error: str | None = None


# The callback of a request, called on the batcher's thread, so it must not block. The last call for
# a request, and only that one, passes an End. A request whose callback raises is cancelled.
Deliver = Callable[[Token | End], None]
