"""Train low-rank updates of a pruned model's weights, under its mask.

Instead of all remaining weights, training changes two thin matrices for each layer. Their product
is added to the weight wherever that is not zero: W + M * (U V), with M = 1 where W is not zero and
0 elsewhere. After training the sum becomes the weight, so the pattern, the layers and the size of
the model stay the same. AdamW keeps moments only for U and V. So memory has to hold the two models
and the gradients of one, but not two moments for every weight.

Source of the idea: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685. Its update would fill the zeros. Here the mask is applied to the product, and the target
is the teacher's distribution rather than the text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thanos_deploy.ranks.sharded import Part, Sharded

# Chosen on held-out C4 documents with SmolLM2-135M at 2:4; see benchmarks/LOG.md.
_RATE = 4e-4


class LowRank:
    """Low-rank updates of the non-zero weights, as a `student.Student`.

    Every rank holds all of U and V and takes the same steps, but holds only its own rows of the
    weights.
    """

    rate = _RATE

    def __init__(self, learner: Sharded, names: Sequence[str], rank: int, seed: int) -> None:
        """Begin with updates of zero: U is zero, V is random.

        Args:
            learner: the model to train.
            names: names of the weights to update.
            rank: rank of each product, limited to the smaller side of its weight.
            seed: seed of V.
        """
        self._learner, self._names = learner, names
        self._kept = [learner.own(name) != 0 for name in names]
        generator = torch.Generator().manual_seed(seed)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            rows, columns = learner.model.get_parameter(name).shape
            inner = min(rank, rows, columns)
            # Scaled so that a step of U moves a weight equally far at any rank.
            right = torch.randn(inner, columns, generator=generator) / inner**0.5
            device = learner.model.device
            self._pairs.append((torch.zeros(rows, inner, device=device), right.to(device)))
        self.learned = [Part(one) for pair in self._pairs for one in pair]
        # The weights contain the rounding of every step, so U and V cannot reproduce them.
        self.derived = [Part(learner.own(name), name) for name in names]
        # The values of U and V whose products the weights already contain.
        self._added = [(left.clone(), right.clone()) for left, right in self._pairs]

    def set_gradients(self) -> None:
        """See `student.Student`."""
        for name, kept, (left, right) in zip(self._names, self._kept, self._pairs, strict=True):
            gradient = self._learner.whole(self._learner.gradient(name).mul_(kept), name)
            left.grad, right.grad = gradient @ right.T, left.T @ gradient
        torch.nn.utils.clip_grad_norm_([one.tensor for one in self.learned], 1.0)

    def resume(self) -> None:
        """See `student.Student`."""
        self._note_added()

    def _note_added(self) -> None:
        """Note that the weights now contain the products of the current U and V."""
        for pair, added in zip(self._pairs, self._added, strict=True):
            for now, before in zip(pair, added, strict=True):
                before.copy_(now)

    def update_weights(self) -> None:
        """See `student.Student`."""
        for name, kept, pair, added in zip(
            self._names, self._kept, self._pairs, self._added, strict=True
        ):
            change = (pair[0] @ pair[1]).sub_(added[0] @ added[1])
            self._learner.own(name).add_(self._learner.rows(change, name) * kept)
        self._note_added()
