"""Prefill, then decode; greedy. Knows ids only, and nothing of text."""

from collections.abc import Iterator, Set

import numpy as np

from runtime.engine import Engine


def generate(
    engine: Engine, prompt: list[int], *, new_tokens: int, stop: Set[int] = frozenset()
) -> Iterator[int]:
    """Continue a prompt with the likeliest token each time.

    Args:
        engine: what to run.
        prompt: ids, at least one.
        new_tokens: the most tokens to yield.
        stop: ids that end the text; they are not yielded.

    Yields:
        ids, as soon as they are known.
    """
    logits = engine.prefill(np.array([prompt], dtype=np.int64))
    for step in range(new_tokens):
        token = int(logits[0].argmax())
        if token in stop:
            return
        yield token
        if step + 1 < new_tokens:
            logits = engine.decode(np.array([token], dtype=np.int64))
