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

# From the tokens of a segment, int64[tokens], to minus the log-probability of each but the first,
# in order and a part at a time, float[part].
Losses = Callable[[Tensor], Iterable[Tensor]]

# Positions whose log-probabilities are held at once: a row of logits is vocabulary-sized.
POSITIONS_AT_ONCE = 256


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
    return perplexity_of(losses_of(reader(model)), segments, frame=frame, on_progress=on_progress)


def reader(model: PreTrainedModel) -> Read:
    """A causal model, in evaluation mode, as something that reads segments."""

    def read(ids: Tensor) -> Iterable[Tensor]:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        return torch.split(logits, POSITIONS_AT_ONCE)

    return read


def losses_of(read: Read) -> Losses:
    """What a model's logits say of the tokens that it reads."""

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
    """Measure whatever knows the losses of segments, one segment at a time.

    This is the protocol of the SparseGPT, Wanda and Thanos papers: windows that do not overlap,
    each scored on its own. Scored is every token of the text that something precedes: all that
    come after a frame (see `frame`), or without one all but a window's first. The frame's own
    tokens are not. lm-evaluation-harness scores all tokens of a text too, with a token in front of
    each window; llama.cpp puts BOS in the place of a window's first token and scores the second
    half of the window only.

    Args:
        losses: of the model; see `losses_of`.
        segments: int64[count, length].
        frame: how many tokens at the beginning of each are its frame. 0 and 1 come to the same.
        on_progress: told of every finished segment.
    """
    count, length = segments.shape
    first = max(frame, 1)
    total: float | Tensor = 0.0  # on the device of the losses, which is read at the end
    on_progress(0, count)
    for done, ids in enumerate(segments, start=1):
        unscored = first - 1
        for part in losses(ids):
            total = total + part[unscored:].double().sum()
            unscored = max(0, unscored - len(part))
        on_progress(done, count)
    return Perplexity(math.exp(float(total) / (count * (length - first))), count, length)
