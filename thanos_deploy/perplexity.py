"""The quality number that goes with every speed number."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.progress import OnProgress, silent

# From the tokens of a segment, int64[tokens], to the logits after each of them, in order and a part
# at a time, float[part, vocabulary].
Read = Callable[[Tensor], Iterable[Tensor]]

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
    """Measure a model of PyTorch; see `perplexity_of`."""
    return perplexity_of(reader(model), segments, on_progress=on_progress)


def reader(model: PreTrainedModel) -> Read:
    """A causal model, in evaluation mode, as something that reads segments."""

    def read(ids: Tensor) -> Iterable[Tensor]:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        return torch.split(logits, _POSITIONS_AT_ONCE)

    return read


def perplexity_of(read: Read, segments: Tensor, *, on_progress: OnProgress = silent) -> Perplexity:
    """Measure whatever reads segments, one at a time.

    This is the protocol of the SparseGPT, Wanda and Thanos papers: non-overlapping windows, no
    token in front of them, and each window scored on its own.

    Args:
        read: the model.
        segments: int64[count, length].
        on_progress: told of every finished segment.
    """
    count, length = segments.shape
    total: float | Tensor = 0.0  # on the device of the logits, which is read at the end
    on_progress(0, count)
    for done, ids in enumerate(segments, start=1):
        following = ids[1:]
        for logits in read(ids):
            targets, following = following[: len(logits)], following[len(logits) :]
            loss = torch.nn.functional.cross_entropy(
                logits[: len(targets)].float(), targets.to(logits.device), reduction="sum"
            )
            total = total + loss.double()
        on_progress(done, count)
    return Perplexity(math.exp(float(total) / (count * (length - 1))), count, length)
