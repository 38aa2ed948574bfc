"""The quality number that goes with every speed number."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.progress import OnProgress, silent

# Positions whose log-probabilities are held at once: a row of logits is vocabulary-sized.
_POSITIONS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over segments that do not overlap.

    Attributes:
        value: exp of the mean negative log-likelihood of every token but a segment's first.
        segments: how many segments.
        length: tokens of each.
    """

    value: float
    segments: int
    length: int


def perplexity(
    model: PreTrainedModel, segments: Tensor, *, on_progress: OnProgress = silent
) -> Perplexity:
    """Measure a causal model, one segment at a time.

    This is the protocol of the SparseGPT, Wanda and Thanos papers: non-overlapping windows, no
    token in front of them, and each window scored on its own.

    Args:
        model: the causal model, in evaluation mode.
        segments: int64[count, length].
        on_progress: told of every finished segment.
    """
    count, length = segments.shape
    total = 0.0
    on_progress(0, count)
    with torch.inference_mode():
        for done, ids in enumerate(segments, start=1):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            for part, target in zip(
                logits.split(_POSITIONS_AT_ONCE), ids[1:].split(_POSITIONS_AT_ONCE), strict=True
            ):
                total += torch.nn.functional.cross_entropy(
                    part.float(), target, reduction="sum"
                ).item()
            on_progress(done, count)
    return Perplexity(math.exp(total / (count * (length - 1))), count, length)
