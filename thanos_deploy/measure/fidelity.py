"""How far a model is from the dense model that it was made from: divergence and agreement.

Perplexity measures how well a model predicts a text. A model can have nearly the perplexity of the
dense model and still predict other tokens (arXiv 2407.09141). So these figures compare the two
models directly:

- the Kullback-Leibler divergence of the model's next-token distribution from the dense model's, in
  nats per token of the text that perplexity is measured on;
- the fraction of the positions in that text at which both models have the same likeliest token;
- on texts that the dense model wrote greedily: how many tokens the model would also have written,
  given the tokens before, and how many of them stand before the first difference.

The dense model's side of the comparison is `Outputs`, made once and kept in a file. It has the last
hidden states instead of the logits, because they are much smaller; the output head computes logits
from them again, a few at a time.
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

# Tokens of a segment that the dense model continues, and the most tokens that it writes.
_PROMPT = 32
_WRITTEN = 256

# Texts that the dense model writes.
_TEXTS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The outputs of a dense model for the segments and questions of an evaluation.

    Attributes:
        states: float32[count, length, hidden], the last hidden state after every token, which the
            output head reads; None if the model computes its logits in another way (see
            `has_plain_head`), so that no divergence can be computed.
        likeliest: int64[count, length], the likeliest token after each token.
        written: int64[texts, prompt + tokens], beginnings of segments and their continuations.
        words, choices: bool[questions], whether each answer is right.
    """

    states: Tensor | None
    likeliest: Tensor
    written: Tensor
    words: Tensor
    choices: Tensor

    def write(self, path: Path) -> None:
        """Write the outputs to a safetensors file."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        save_file(
            {name: one.contiguous() for name, one in tensors.items() if one is not None}, path
        )

    @classmethod
    def read(cls, path: Path) -> "Outputs":
        """Read a file that `write` has written.

        Raises:
            InputError: the file is missing or cannot be read.
        """
        with boundary(
            InputError,
            f"{path}: not readable",
            fix="remove the dense model's folder from the cache, and repeat the command",
        ):
            found = load_file(path)
            return cls(found.pop("states", None), **found)


class Divergence:
    """The mean divergence from a dense model, added up some positions at a time."""

    def __init__(self, states: Tensor, head: Head) -> None:
        """Start without any position.

        Args:
            states: last hidden states of the dense model; see `Outputs`.
            head: output head of the dense model, on the device of the model that is compared.
        """
        self._states, self._head = states, head
        self._nats: float | Tensor = 0.0
        self._positions = 0

    def add(self, segment: int, first: int, log_p: Tensor) -> None:
        """Add some consecutive positions of a segment.

        Args:
            segment: index of the segment.
            first: the first position.
            log_p: float32[positions, vocabulary], log-probabilities of the next token at each of
                these positions, of the model that is compared.
        """
        states = self._states[segment, first : first + len(log_p)].to(log_p.device)
        log_q = self._head(states).float().log_softmax(dim=-1)
        nats = (log_q.exp() * log_q.sub(log_p)).sum(dim=-1)
        self._nats = self._nats + nats.double().sum()
        self._positions += len(log_p)

    @property
    def mean(self) -> float:
        """The mean divergence in nats per token."""
        return float(self._nats) / self._positions


def _prompt_tokens(segments: Tensor) -> int:
    """Return how many tokens of a segment are the beginning that a model continues."""
    return min(_PROMPT, segments.shape[1] // 2)


@torch.inference_mode()
def written_by(model: PreTrainedModel, segments: Tensor, longest: int) -> Tensor:
    """Continue the beginnings of segments greedily with a model.

    Each text gets `_WRITTEN` tokens, or as many as the model takes; no token ends it earlier.

    Args:
        model: the dense model.
        segments: int64[count, length]; the first `_TEXTS` of them are used.
        longest: the most tokens that the model takes.

    Returns:
        int64[texts, prompt + tokens].
    """
    prompt = _prompt_tokens(segments)
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
    """Compare a model's likeliest tokens with those of the dense model.

    Args:
        divergence: nats per token; None if it is unknown.
        outputs: outputs of the dense model.
        likeliest: int64[count, length], the model's likeliest token after each token of the
            segments.
        continued: int64[texts, prompt + tokens], the model's likeliest token after each token of
            the texts that the dense model wrote.
        frame: number of tokens of the frame; predictions of its tokens do not count.
    """
    first = max(frame, 1) - 1
    same = likeliest[:, first:-1] == outputs.likeliest[:, first:-1]
    prompt = _prompt_tokens(likeliest)
    right = continued[:, prompt - 1 : -1] == outputs.written[:, prompt:]
    return Fidelity(
        divergence=divergence,
        agreement=float(same.double().mean()),
        texts=len(right),
        tokens=right.shape[1],
        continued=float(right.double().mean()) * right.shape[1],
        before_first=float(right.long().cumprod(dim=1).sum(dim=1).double().mean()),
    )
