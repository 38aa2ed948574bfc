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

# In place of a token that is not to be predicted.
_NOT_SCORED = -100


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over segments that do not overlap.

    Attributes:
        value: exp of the mean negative log-likelihood of the tokens that are scored.
        segments: how many segments.
        length: tokens of each.
    """

    value: float
    segments: int
    length: int


def perplexity(
    model: PreTrainedModel, segments: Tensor, *, frame: int = 0, on_progress: OnProgress = silent
) -> Perplexity:
    """Measure a model of PyTorch; see `perplexity_of`."""
    return perplexity_of(reader(model), segments, frame=frame, on_progress=on_progress)


def reader(model: PreTrainedModel) -> Read:
    """A causal model, in evaluation mode, as something that reads segments."""

    def read(ids: Tensor) -> Iterable[Tensor]:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        return torch.split(logits, _POSITIONS_AT_ONCE)

    return read


def perplexity_of(
    read: Read, segments: Tensor, *, frame: int = 0, on_progress: OnProgress = silent
) -> Perplexity:
    """Measure whatever reads segments, one at a time.

    This is the protocol of the SparseGPT, Wanda and Thanos papers: windows that do not overlap,
    each scored on its own. Scored is every token of the text that something precedes: all that
    come after a frame (see `frame`), or without one all but a window's first. The frame's own
    tokens are not. lm-evaluation-harness scores all tokens of a text too, with a token in front of
    each window; llama.cpp puts BOS in the place of a window's first token and scores the second
    half of the window only.

    Args:
        read: the model.
        segments: int64[count, length].
        frame: how many tokens at the beginning of each are its frame. 0 and 1 come to the same.
        on_progress: told of every finished segment.
    """
    count, length = segments.shape
    first = max(frame, 1)
    total: float | Tensor = 0.0  # on the device of the logits, which is read at the end
    on_progress(0, count)
    for done, ids in enumerate(segments, start=1):
        following = ids[1:].clone()
        following[: first - 1] = _NOT_SCORED
        for logits in read(ids):
            targets, following = following[: len(logits)], following[len(logits) :]
            loss = torch.nn.functional.cross_entropy(
                logits[: len(targets)].float(),
                targets.to(logits.device),
                ignore_index=_NOT_SCORED,
                reduction="sum",
            )
            total = total + loss.double()
        on_progress(done, count)
    return Perplexity(math.exp(float(total) / (count * (length - first))), count, length)
