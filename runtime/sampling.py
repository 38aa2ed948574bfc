"""Choose the next token from the logits; works on token ids only.

The steps and their order are those of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p, then a draw. OpenAI's frequency and presence penalties and biases come after
the repetition penalty. Finite logits give a token with every allowed setting: the likeliest token
is never cut off, and a logit that overflows counts as the smallest, or the largest, possible.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thanos_deploy.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose the next token; the default is greedy.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: the smallest set of likeliest tokens with at least this total probability is drawn
            from.
        min_p: tokens less likely than this fraction of the largest probability are left out.
        repetition_penalty: the logits of tokens seen so far, prompt included, are divided by it if
            positive, and multiplied by it if negative; 1 for no penalty.
        frequency_penalty: subtracted from the logit of a token for each time that it was generated.
        presence_penalty: subtracted from the logit of every token that was generated.
        seed: seed of the random numbers; row i of a batch uses seed + i.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
            ("frequency_penalty", np.isfinite(self.frequency_penalty), "from -2 to 2"),
            ("presence_penalty", np.isfinite(self.presence_penalty), "from -2 to 2"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not holds:  # NaN is in no range
                raise UsageError(
                    f"{name} {getattr(self, name)}: out of range", fix=f"give a value {range_}"
                )


GREEDY = Sampling()

# The largest magnitude of a penalised logit: the difference of two such numbers is finite.
_LARGEST = np.finfo(np.float64).max / 4


class Sampler:
    """Chooses the tokens of one sequence, and remembers which were seen."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int],
        row: int = 0,
        *,
        bias: Mapping[int, float] | None = None,
    ) -> None:
        """Start after a prompt.

        Args:
            sampling: how to choose.
            prompt: the ids of the prompt; they count as seen.
            row: the row in the batch, which is added to the seed.
            bias: maps ids to values that are added to their logits.
        """
        self._sampling = sampling
        self._seen = set(prompt)
        self._counts: Counter[int] = Counter()
        self._bias = dict(bias or {})
        self._random = np.random.default_rng(sampling.seed + row)

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose the next token.

        Args:
            logits: float32[vocabulary].
            allowed: bool[vocabulary], True for the tokens that may be chosen, at least one; None
                for all.
        """
        scores = penalise(logits, self._seen, self._sampling.repetition_penalty)
        self._shift(scores)
        if allowed is not None:
            scores[~allowed] = -np.inf
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            cumulative = probabilities(scores, self._sampling).cumsum()
            # The last sum may be a little below 1, so the draw is scaled by it. The product may be
            # rounded up to the sum itself, to the right of which there is no token. With
            # side="right" a token of probability 0 is never drawn.
            drawn = self._random.random() * cumulative[-1]
            drawn = min(drawn, np.nextafter(cumulative[-1], 0))
            token = int(np.searchsorted(cumulative, drawn, side="right"))
        self._seen.add(token)
        self._counts[token] += 1
        return token

    def _shift(self, scores: NDArray[np.float64]) -> None:
        """Apply the frequency and presence penalties and the biases, in place."""
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        if (frequency or presence) and self._counts:
            counts = np.array(list(self._counts.values()))
            scores[list(self._counts)] -= frequency * counts + presence
        if self._bias:
            scores[list(self._bias)] += list(self._bias.values())


def penalise(
    logits: NDArray[np.float32], seen: Iterable[int], penalty: float
) -> NDArray[np.float64]:
    """Return the logits as float64[vocabulary], with the repetition penalty on seen tokens."""
    scores = logits.astype(np.float64)
    if penalty != 1:
        ids = list(seen)
        with np.errstate(over="ignore"):
            moved = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
        scores[ids] = np.clip(moved, -_LARGEST, _LARGEST)
    return scores


def probabilities(scores: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Return the probabilities to draw from, float64[vocabulary] with the sum 1.

    Args:
        scores: float64[vocabulary], the logits after penalties and biases.
        sampling: how to choose, with a temperature above 0.
    """
    # Relative to the largest score: a tiny temperature then gives -inf, and never inf or NaN.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = np.where(
            scores < np.partition(scores, -sampling.top_k)[-sampling.top_k], -np.inf, scores
        )
    if sampling.top_p < 1:
        odds = _softmax(scores)
        # All tokens less likely than this sum to less than 1 - top_p, so they need not be sorted.
        # The minimum keeps the likeliest token in spite of rounding.
        least = min((1 - sampling.top_p) / len(odds), odds.max())
        candidates = np.flatnonzero(odds >= least)
        order = candidates[np.argsort(-scores[candidates], kind="stable")]
        before = np.cumsum(odds[order])
        before = np.concatenate([[0.0], before[:-1]])  # total probability of the likelier tokens
        kept = order[before < sampling.top_p]
        cut = np.full_like(scores, -np.inf)
        cut[kept] = scores[kept]
        scores = cut
    if sampling.min_p > 0:
        odds = _softmax(scores)
        scores[odds < sampling.min_p * odds.max()] = -np.inf
    return _softmax(scores)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    odds = np.exp(scores - scores.max())
    result: NDArray[np.float64] = odds / odds.sum()
    return result
