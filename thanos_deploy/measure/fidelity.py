"""How far a model is from the dense one that it was made from: divergence and agreement.

Perplexity asks what a model makes of a text. A model can have nearly the dense one's perplexity and
still say other things (arXiv 2407.09141), so these compare the two models themselves:

- the Kullback-Leibler divergence of the next token's distribution from the dense model's, in nats
  per token of the text that perplexity is measured on;
- at how many of its positions both have the same likeliest token;
- the same on texts that the dense model wrote itself, greedily: how many tokens of them the model
  would have written after those before, and how many it would before the first that differs.

The dense model's part of this is `Outputs`, which are made once and kept: its last hidden states
rather than its logits, which its head makes again a few at a time.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.errors import InputError, boundary
from thanos_deploy.measure.quality import Fidelity
from thanos_deploy.model.head import Head

# Of a segment, what the dense model goes on from, and by how many tokens at most.
_PROMPT = 32
_WRITTEN = 256

# Texts that it writes.
_TEXTS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a dense model makes of segments.

    Attributes:
        states: float32[count, length, hidden], what its head reads after every token; None if it
            makes its logits otherwise (see `has_plain_head`), so that no divergence can be had.
        likeliest: int64[count, length], the likeliest token after each.
        written: int64[texts, prompt + tokens], beginnings of segments and how it goes on.
        words, choices: bool[questions], which ones it answers right.
    """

    states: Tensor | None
    likeliest: Tensor
    written: Tensor
    words: Tensor
    choices: Tensor

    def write(self, path: Path) -> None:
        """Keep them."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        save_file(
            {name: one.contiguous() for name, one in tensors.items() if one is not None}, path
        )

    @classmethod
    def read(cls, path: Path) -> "Outputs":
        """What `write` has kept.

        Raises:
            InputError: it is not there or not readable.
        """
        with boundary(
            InputError,
            f"{path}: not readable",
            fix="remove the dense model's folder from the cache, and repeat the command",
        ):
            found = load_file(path)
            return cls(found.pop("states", None), **found)


class Divergence:
    """Adds up the divergence from a dense model, a part of the positions at a time."""

    def __init__(self, states: Tensor, head: Head) -> None:
        """Begin.

        Args:
            states: of the dense model; see `Outputs`.
            head: of the dense model, on the device of the other one.
        """
        self._states, self._head = states, head
        self._nats: float | Tensor = 0.0
        self._positions = 0

    def add(self, segment: int, first: int, log_p: Tensor) -> None:
        """Add some positions of a segment.

        Args:
            segment: its number.
            first: of the positions.
            log_p: float32[positions, vocabulary], the model's log-probabilities after them.
        """
        states = self._states[segment, first : first + len(log_p)].to(log_p.device)
        log_q = self._head(states).float().log_softmax(dim=-1)
        nats = (log_q.exp() * log_q.sub(log_p)).sum(dim=-1)
        self._nats = self._nats + nats.double().sum()
        self._positions += len(log_p)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self._nats) / self._positions


@torch.inference_mode()
def written_by(model: PreTrainedModel, segments: Tensor, longest: int) -> Tensor:
    """Beginnings of segments, and how a model goes on, always with the likeliest token.

    Nothing ends a text before `_WRITTEN` tokens, or as many as the model takes.

    Args:
        model: the dense one.
        segments: int64[count, length], of which the first ones are begun with.
        longest: tokens that the model takes.

    Returns:
        int64[texts, prompt + tokens].
    """
    prompt = min(_PROMPT, segments.shape[1] // 2)
    found = [segments[:_TEXTS, :prompt].to(model.device)]
    cache = None
    for _ in range(min(_WRITTEN, longest - prompt)):
        read = model(input_ids=found[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = read.past_key_values
        found.append(read.logits.argmax(dim=-1))
    return torch.cat(found, dim=1).cpu()


def compared(
    divergence: float | None, outputs: Outputs, likeliest: Tensor, continued: Tensor, frame: int
) -> Fidelity:
    """How far a model is from the dense one.

    Args:
        divergence: nats per token; None where it is not known.
        outputs: of the dense model.
        likeliest: int64[count, length], the model's likeliest token after each of the segments'.
        continued: int64[texts, prompt + tokens], the same for the texts that the dense one wrote.
        frame: tokens at the beginning of a segment that do not count.
    """
    first = max(frame, 1) - 1
    same = likeliest[:, first:-1] == outputs.likeliest[:, first:-1]
    prompt = min(_PROMPT, likeliest.shape[1] // 2)
    right = continued[:, prompt - 1 : -1] == outputs.written[:, prompt:]
    return Fidelity(
        divergence=divergence,
        agreement=float(same.double().mean()),
        texts=len(right),
        tokens=right.shape[1],
        continued=float(right.double().mean()) * right.shape[1],
        before_first=float(right.long().cumprod(dim=1).sum(dim=1).double().mean()),
    )
