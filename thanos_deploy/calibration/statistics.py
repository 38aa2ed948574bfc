"""What calibration keeps of the inputs of a linear layer: sums that can be added up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import products_in
from thanos_deploy.ranks.group import Ranks
from thanos_deploy.ranks.sums import OrderedSum

# Columns of a Gram matrix that are multiplied at once: few enough to spare most of what lies below
# the diagonal, enough for the product to run at full speed.
_COLUMNS = 512

# Of the calibration text, for each input of an expert's layer. With fewer, its Hessian has no
# inverse but by damping, and what is fitted to few tokens harms all others: so nothing is fitted.
LEAST_TOKENS = 1


def _runs(cols: int) -> list[tuple[int, int]]:
    """Columns in runs of about as many as are multiplied at once: first, and one after the last."""
    count = max(1, cols // _COLUMNS)
    return [(cols * k // count, cols * (k + 1) // count) for k in range(count)]


@dataclass(slots=True, eq=False)
class Statistics:
    """Calibration statistics of one layer's input x, and of the same input y in the dense model.

    Attributes:
        mass: the number of tokens, or the sum of their weights.
        hessian: float32[cols, cols], the sum of x x^T over all tokens; complete below its diagonal
            once `complete` has been called.
        total: float32[cols], the sum of x.
        cross: float32[dense cols, cols], the sum of y x^T; None if the dense model was not asked
            for.
        dense_total: float32[dense cols], the sum of y; the same.
    """

    mass: float
    hessian: Tensor
    total: Tensor
    cross: Tensor | None
    dense_total: Tensor | None

    @classmethod
    def empty(
        cls, cols: int, dense_cols: int | None = None, *, device: torch.device = CPU
    ) -> "Statistics":
        """Of no tokens, for inputs that are on a device."""
        zeros = partial(torch.zeros, device=device)
        return cls(
            mass=0.0,
            hessian=zeros(cols, cols),
            total=zeros(cols),
            cross=None if dense_cols is None else zeros(dense_cols, cols),
            dense_total=None if dense_cols is None else zeros(dense_cols),
        )

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """Count some tokens; float32 or bfloat16 [tokens, cols] each."""
        # Products of bfloat16 numbers lose nothing where they are multiplied as such.
        with products_in(x.dtype):
            self._add(x.float(), None if y is None else y.float())

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        self.mass += len(x)
        self._add_product(x, x)
        self.total += x.sum(dim=0)
        if y is not None:
            assert self.cross is not None
            assert self.dense_total is not None
            self.cross.addmm_(y.T, x)
            self.dense_total += y.sum(dim=0)

    def add_weighted(self, x: Tensor, weight: Tensor) -> None:
        """Count some tokens, float32[tokens, cols], each with its weight, float32[tokens, 1]."""
        self.mass += weight.sum().item()
        self._add_product(weight * x, x)
        self.total += (weight * x).sum(dim=0)

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right, which is symmetric, on and above the diagonal."""
        for start, stop in _runs(right.shape[1]):
            self.hessian[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])

    @property
    def _sums(self) -> list[Tensor]:
        """Everything that is added up, but for the mass."""
        found = (self.hessian, self.total, self.cross, self.dense_total)
        return [tensor for tensor in found if tensor is not None]

    def complete(self) -> None:
        """Fill in what is below the diagonal of the Hessian, when all tokens have been counted."""
        for start, stop in _runs(len(self.hessian)):
            block = self.hessian[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    @property
    def too_few(self) -> str:
        """Why nothing can be fitted to so few tokens; empty if something can.

        Only the tokens that a router sends to an expert can be so few.
        """
        tokens, inputs = int(self.mass), len(self.hessian)
        if not tokens:
            return (
                "no token of the calibration text reached this layer, so all of its inputs "
                "count equally"
            )
        if tokens < inputs * LEAST_TOKENS:
            return (
                f"{tokens} tokens of the calibration text reached this layer, fewer than "
                f"its {inputs} inputs"
            )
        return ""

    def centred(self) -> "Statistics":
        """The same around the means: what is left for a weight to explain beside a free bias."""
        cross = self.cross
        if cross is not None:
            assert self.dense_total is not None
            cross = cross - torch.outer(self.dense_total, self.total) / self.mass
        hessian = self.hessian - torch.outer(self.total, self.total) / self.mass
        return replace(self, hessian=hessian, cross=cross)


@dataclass(frozen=True, slots=True)
class _Masses:
    """What one rank counted in its turns; see `Statistics.mass`.

    Attributes:
        by_name: of each layer, turn after turn.
    """

    by_name: Mapping[str, tuple[float, ...]]


class ShardSums:
    """Statistics of layers, summed shard by shard in one order, whichever rank counts a shard."""

    def __init__(self, ranks: Ranks, shards: int, names: Sequence[str]) -> None:
        """Begin with no shard.

        Args:
            ranks: those that count.
            shards: how many there are.
            names: of the layers, in the order of the result.
        """
        self._ranks, self._names = ranks, names
        self._order = OrderedSum(ranks, shards)
        self._sums: dict[str, OrderedSum] = {}
        self._latest: dict[str, Statistics] = {}
        self._masses: dict[str, tuple[float, ...]] = {}

    @property
    def shards(self) -> list[int | None]:
        """This rank's shard in each turn; None where it has none."""
        return [self._order.mine(turn) for turn in range(self._order.turns)]

    def add(self, part: Mapping[str, Statistics]) -> None:
        """Add what this rank counted in the next turn; nothing where it had no shard."""
        counted = bool(part)
        if counted:
            self._latest = dict(part)
        for name in self._names:
            statistics = self._latest[name]
            if name not in self._sums:
                self._sums[name] = OrderedSum(self._ranks, self._order.count)
                self._masses[name] = ()
            if counted:
                self._masses[name] += (statistics.mass,)
            self._sums[name].add(statistics._sums)

    def finish(self) -> dict[str, Statistics]:
        """The statistics of all shards, on every rank."""
        self._latest = {}
        by_rank = self._ranks.gather(_Masses(self._masses))
        finished = {}
        for name, sums in self._sums.items():
            turns = [masses.by_name[name] for masses in by_rank]
            mass = 0.0
            for number in range(self._order.count):
                turn, rank = divmod(number, self._ranks.size)
                mass += turns[rank][turn]
            hessian, total, *dense = sums.finish()
            cross, dense_total = dense if dense else (None, None)
            finished[name] = Statistics(mass, hessian, total, cross, dense_total)
            finished[name].complete()
        return finished
