"""Perplexity over segments of a text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.progress import OnProgress, silent

# Maps the tokens of a segment, int64[tokens], to the logits after each token, in order and a part
# at a time, float[part, vocabulary].
Read = Callable[[Tensor], Iterable[Tensor]]

# Maps the tokens of a segment, int64[tokens], to the negative log-probability of each token but the
# first, in order and a part at a time, float[part].
Losses = Callable[[Tensor], Iterable[Tensor]]

# Positions whose log-probabilities are held at once: a row of logits is vocabulary-sized.
POSITIONS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over segments that do not overlap.

    Attributes:
        value: exp of the mean negative log-likelihood of the tokens that are scored.
        segments: number of segments.
        length: tokens in each segment.
    """

    value: float
    segments: int
    length: int


def perplexity(
    model: PreTrainedModel, segments: Tensor, *, frame: int = 0, on_progress: OnProgress = silent
) -> Perplexity:
    """Measure the perplexity of a PyTorch model; see `perplexity_of`."""
    return perplexity_of(losses_of(reader(model)), segments, frame=frame, on_progress=on_progress)


def reader(model: PreTrainedModel) -> Read:
    """Return a function that reads segments with a causal model in evaluation mode."""

    def read(ids: Tensor) -> Iterable[Tensor]:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        return torch.split(logits, POSITIONS_AT_ONCE)

    return read


def losses_of(read: Read) -> Losses:
    """Return a function that computes losses from the logits of `read`."""

    def losses(ids: Tensor) -> Iterable[Tensor]:
        following = ids[1:]
        for logits in read(ids):
            targets, following = following[: len(logits)], following[len(logits) :]
            yield torch.nn.functional.cross_entropy(
                logits[: len(targets)].float(), targets.to(logits.device), reduction="none"
            )

    return losses


def perplexity_of(
    losses: Losses, segments: Tensor, *, frame: int = 0, on_progress: OnProgress = silent
) -> Perplexity:
    """Measure perplexity from a model's losses, one segment at a time.

    This is the protocol of the SparseGPT, Wanda and Thanos papers: windows that do not overlap,
    each scored on its own. Every token of the text that another token precedes is scored: with a
    frame, all tokens after it; without one, all but the first of a window. Tokens of the frame are
    not scored. lm-evaluation-harness also scores all tokens of a text, with a token in front of
    each window; llama.cpp replaces the first token of a window by BOS, and scores only the second
    half of the window.

    Args:
        losses: computes the losses of a segment; see `losses_of`.
        segments: int64[count, length].
        frame: number of tokens at the beginning of each segment that are its frame. 0 and 1 give
            the same result.
        on_progress: called after every segment.
    """
    count, length = segments.shape
    first = max(frame, 1)
    total: float | Tensor = 0.0  # stays on the device of the losses until the end
    on_progress(0, count)
    for done, ids in enumerate(segments, start=1):
        unscored = first - 1
        for part in losses(ids):
            total = total + part[unscored:].double().sum()
            unscored = max(0, unscored - len(part))
        on_progress(done, count)
    return Perplexity(math.exp(float(total) / (count * (length - first))), count, length)
