"""Log probabilities of tokens, in the model's distribution."""

import numpy as np
from numpy.typing import NDArray

from runtime.batching.requests import Token


def token_of(chosen: int, logits: NDArray[np.float32], alternatives: int | None) -> Token:
    """Return a token with its log probability, and the likeliest tokens in its place with theirs.

    Args:
        chosen: the token.
        logits: float32[vocabulary].
        alternatives: number of likeliest tokens; None for no log probability at all.
    """
    if alternatives is None:
        return Token(chosen, None)
    scores = logits.astype(np.float64)
    scores -= scores.max()
    logprobs = scores - np.log(np.exp(scores).sum())
    return Token(
        chosen,
        float(logprobs[chosen]),
        tuple((token, float(logprobs[token])) for token in _likeliest(logprobs, alternatives)),
    )


def _likeliest(logprobs: NDArray[np.float64], count: int) -> list[int]:
    """Return the `count` likeliest ids, likeliest first; of equals, the smaller first."""
    if count == 0:
        return []
    least = np.partition(logprobs, -count)[-count] if count < len(logprobs) else -np.inf
    candidates = np.flatnonzero(logprobs >= least)  # sorting all of them would take milliseconds
    order = np.argsort(-logprobs[candidates], kind="stable")
    ids: list[int] = candidates[order[:count]].tolist()
    return ids
