"""What a training changes: tensors that are learned, and the weights that follow from them.

`recover` trains any `Student`. Here are the weights themselves; `low_rank` has low-rank updates of
them, and `train_scales` the scales of a quantised model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from thanos_deploy.ranks.sharded import Part, Sharded

# Learning rate of the weights; measured best on held-out text, see benchmarks/LOG.md.
_RATE = 4e-4


class Student(Protocol):
    """The trained tensors of a model, from which its weights are computed."""

    @property
    def learned(self) -> Sequence[Part]:
        """The tensors that AdamW changes in place; the same tensors on every call."""
        ...

    @property
    def derived(self) -> Sequence[Part]:
        """Tensors updated step by step that `learned` cannot reproduce to the last bit."""
        ...

    @property
    def rate(self) -> float:
        """The largest learning rate of AdamW."""
        ...

    def set_gradients(self) -> None:
        """Set the gradients of `learned` from the gradients of the model's weights."""
        ...

    def update_weights(self) -> None:
        """Update the model's weights from `learned`."""
        ...

    def resume(self) -> None:
        """Continue after `learned` and `derived` were restored to their values after a step."""
        ...


class KeptWeights:
    """The non-zero weights themselves as a `Student`; each rank trains its rows of them."""

    rate = _RATE
    derived: Sequence[Part] = ()

    def __init__(self, learner: Sharded, names: Sequence[str]) -> None:
        self._learner, self._names = learner, names
        self.learned = [Part(learner.own(name), name) for name in names]
        self._kept = [weight.tensor != 0 for weight in self.learned]

    def set_gradients(self) -> None:
        """See `Student`."""
        gradients = [self._learner.gradient(name) for name in self._names]
        for weight, gradient, keep in zip(self.learned, gradients, self._kept, strict=True):
            # With a gradient of zero, Adam's moments are zero too, and the weight does not move.
            weight.tensor.grad = gradient.mul_(keep)
        _clip(self._learner, self._names, 1.0)

    def update_weights(self) -> None:
        """See `Student`."""

    def resume(self) -> None:
        """See `Student`."""


def _clip(learner: Sharded, names: Sequence[str], most: float) -> None:
    """Scale the gradients so that their norm over all weights is at most `most`."""
    rows = [
        learner.whole(learner.gradient(name).double().square().sum(dim=1), name) for name in names
    ]
    norm = torch.cat(rows).sum().sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0).float()
    for name in names:
        learner.gradient(name).mul_(scale)
