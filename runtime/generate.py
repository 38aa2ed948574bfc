"""Prefill, then decode one token of every sequence at a time; works on token ids, not on text."""

from collections.abc import Iterator, Sequence, Set

import numpy as np

from runtime.engine import Engine, Ids
from runtime.sampling import GREEDY, Sampler, Sampling
from thanos_deploy.errors import UsageError


def generate(
    engine: Engine,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    stop: Set[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Continue one prompt; see `generate_batch`.

    Yields:
        ids, as soon as they are known.
    """
    rows = generate_batch(engine, [prompt], new_tokens=new_tokens, stop=stop, sampling=sampling)
    for (token,) in rows:
        assert token is not None  # a batch of one ends with its sequence
        yield token


def generate_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: Set[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[int | None, ...]]:
    """Continue prompts of any lengths together.

    Args:
        engine: the engine to run.
        prompts: the ids of each prompt, at least one.
        new_tokens: largest number of tokens to yield for each prompt; fewer if the engine's longest
            sequence is reached.
        stop: ids that end a text; they are not yielded.
        sampling: how to choose the tokens.

    Yields:
        the next token of every sequence, None for sequences that have ended; stops when all have.

    Raises:
        UsageError: there is no prompt, or a prompt is empty.
    """
    ids, mask = _pad(prompts)
    samplers = [Sampler(sampling, prompt, row) for row, prompt in enumerate(prompts)]
    alive = [True] * len(prompts)
    if new_tokens < 1:
        return
    logits = engine.prefill(ids, mask)
    # The last token is never fed back to the engine, so it may be one beyond its longest sequence.
    steps = min(new_tokens, engine.max_sequence - ids.shape[1] + 1)
    for step in range(steps):
        chosen = [
            sampler.choose(row) if going else 0
            for sampler, row, going in zip(samplers, logits, alive, strict=True)
        ]
        alive = [going and token not in stop for going, token in zip(alive, chosen, strict=True)]
        if not any(alive):
            return
        yield tuple(token if going else None for token, going in zip(chosen, alive, strict=True))
        if step + 1 < steps:
            logits = engine.decode(np.array(chosen, dtype=np.int64))


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids | None]:
    """Return int64[batch, longest], padded with 0 on the left, and its mask or None."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise UsageError(
            f"{len(lengths)} prompts of {lengths} tokens: there is no text to continue",
            fix="give at least one prompt, and at least one token in each",
        )
    longest = max(lengths)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, None if mask.all() else mask
