"""Calibration statistics of a linear layer's input, as sums over tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from thanos_deploy.machine.devices import CPU
from thanos_deploy.machine.precision import products_in
from thanos_deploy.ranks.group import Ranks
from thanos_deploy.ranks.sums import OrderedSum

# Columns of a Gram matrix that are computed in one product: few enough to skip most of the lower
# triangle, and enough for the product to run at full speed.
_COLUMNS = 512

# Calibration tokens that an expert's layer needs per input feature. With fewer, its Hessian is
# singular without damping, and a fit to so few tokens harms all other tokens. So nothing is fitted.
LEAST_TOKENS = 1


def _runs(cols: int) -> list[tuple[int, int]]:
    """Divide the columns into runs of about `_COLUMNS`; the start and stop of each."""
    count = max(1, cols // _COLUMNS)
    return [(cols * k // count, cols * (k + 1) // count) for k in range(count)]


@dataclass(slots=True, eq=False)
class Statistics:
    """Calibration statistics of one layer's input x, and of the same input y in the dense model.

    Attributes:
        mass: the number of tokens, or the sum of their weights.
        hessian: float32[cols, cols], the sum of x x^T over all tokens; its lower triangle is only
            valid once `complete` has been called.
        total: float32[cols], the sum of x.
        cross: float32[dense cols, cols], the sum of y x^T; None without the dense model.
        dense_total: float32[dense cols], the sum of y; None without the dense model.
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
        """Return the statistics of no tokens.

        Args:
            cols: number of input features of the layer.
            dense_cols: number of its input features in the dense model; None without that model.
            device: where the inputs are.
        """
        zeros = partial(torch.zeros, device=device)
        return cls(
            mass=0.0,
            hessian=zeros(cols, cols),
            total=zeros(cols),
            cross=None if dense_cols is None else zeros(dense_cols, cols),
            dense_total=None if dense_cols is None else zeros(dense_cols),
        )

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """Add some tokens.

        Args:
            x: float32 or bfloat16 [tokens, cols], the inputs.
            y: [tokens, dense cols], the inputs in the dense model; None without that model.
        """
        # Factors that were bfloat16 already lose nothing if the product rounds them to bfloat16.
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
        """Add some tokens, float32[tokens, cols], each with its weight, float32[tokens, 1]."""
        self.mass += weight.sum().item()
        self._add_product(weight * x, x)
        self.total += (weight * x).sum(dim=0)

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the upper triangle of left^T right, which is symmetric, to the Hessian."""
        for start, stop in _runs(right.shape[1]):
            self.hessian[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])

    @property
    def _sums(self) -> list[Tensor]:
        """All sums except the mass."""
        found = (self.hessian, self.total, self.cross, self.dense_total)
        return [tensor for tensor in found if tensor is not None]

    def complete(self) -> None:
        """Fill in the lower triangle of the Hessian, after the last token has been added."""
        for start, stop in _runs(len(self.hessian)):
            block = self.hessian[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    @property
    def too_few(self) -> str:
        """Why there are too few tokens to fit a weight to, as text; empty if there are enough.

        This concerns the layers of experts, which see only the tokens that the router sends them.
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
        """Return a copy whose products of x and y are taken around their means.

        A layer with a free bias is fitted with these, because the bias takes up the means.
        """
        cross = self.cross
        if cross is not None:
            assert self.dense_total is not None
            cross = cross - torch.outer(self.dense_total, self.total) / self.mass
        hessian = self.hessian - torch.outer(self.total, self.total) / self.mass
        return replace(self, hessian=hessian, cross=cross)


@dataclass(frozen=True, slots=True)
class _Masses:
    """The masses that one rank counted; see `Statistics.mass`.

    Attributes:
        by_name: maps the name of each layer to its mass in each of the rank's turns.
    """

    by_name: Mapping[str, tuple[float, ...]]


class ShardSums:
    """Statistics of layers, summed in the order of the shards, whichever rank has a shard."""

    def __init__(self, ranks: Ranks, shards: int, names: Sequence[str]) -> None:
        """Begin with no shard.

        Args:
            ranks: the ranks among which the shards are divided.
            shards: number of shards.
            names: names of the layers, in the order of the result.
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
        """Add the statistics of this rank's shard in the next turn; empty if it had no shard."""
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
        """Return the statistics of all shards, by layer name, on every rank."""
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
