"""Train low-rank updates of a pruned model's weights, under its mask.

In place of every weight that is left, what learns is a product of two thin matrices for each layer,
which is added to the weight wherever it is not zero: W + M * (U V), with M one where W is not zero.
After training the sum is the weight, so the model has the pattern, the layers and the size that it
had. AdamW has moments only for U and V, so this takes memory for the two models and a gradient of
one, and not for two moments of every weight besides.

Source of the idea: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685, whose sum would fill the zeros again; here the mask is on the product, and the teacher's
distribution is learned rather than the text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thanos_deploy.ranks.sharded import Part, Sharded

# Chosen on held-out C4 documents with SmolLM2-135M at 2:4; see benchmarks/LOG.md.
_RATE = 4e-4


class LowRank:
    """Updates of the weights that are not zero as a `recover.Student`.

    Every rank has all of U and V and takes the same steps; of the weights each has its rows.
    """

    rate = _RATE

    def __init__(self, learner: Sharded, names: Sequence[str], rank: int, seed: int) -> None:
        """Begin with updates of zero: U is zero, V random.

        Args:
            learner: the model.
            names: of the weights that learn.
            rank: the most that a product may have; a smaller matrix has its own size.
            seed: of V.
        """
        self._learner, self._names = learner, names
        self._kept = [learner.own(name) != 0 for name in names]
        generator = torch.Generator().manual_seed(seed)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            rows, columns = learner.model.get_parameter(name).shape
            inner = min(rank, rows, columns)
            # A step of U moves a weight equally far at any rank.
            right = torch.randn(inner, columns, generator=generator) / inner**0.5
            device = learner.model.device
            self._pairs.append((torch.zeros(rows, inner, device=device), right.to(device)))
        self.learned = [Part(one) for pair in self._pairs for one in pair]
        # The weights have every step's rounding in them.
        self.made = [Part(learner.own(name), name) for name in names]
        # Whose products the weights already have in them.
        self._added = [(left.clone(), right.clone()) for left, right in self._pairs]

    def receive(self) -> None:
        """See `recover.Student`."""
        for name, kept, (left, right) in zip(self._names, self._kept, self._pairs, strict=True):
            gradient = self._learner.whole(self._learner.gradient(name).mul_(kept), name)
            left.grad, right.grad = gradient @ right.T, left.T @ gradient
        torch.nn.utils.clip_grad_norm_([one.tensor for one in self.learned], 1.0)

    def resume(self) -> None:
        """See `recover.Student`."""
        self._note_added()

    def _note_added(self) -> None:
        """The weights have the products of U and V as they are now."""
        for pair, added in zip(self._pairs, self._added, strict=True):
            for now, before in zip(pair, added, strict=True):
                before.copy_(now)

    def settle(self) -> None:
        """See `recover.Student`."""
        for name, kept, pair, added in zip(
            self._names, self._kept, self._pairs, self._added, strict=True
        ):
            change = (pair[0] @ pair[1]).sub_(added[0] @ added[1])
            self._learner.own(name).add_(self._learner.rows(change, name) * kept)
        self._note_added()
