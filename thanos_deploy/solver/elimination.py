"""Remove a layer's inputs group by group, and refit the inputs that stay.

Source: the multi-weight lemma of Ilin and Richtarik, arXiv 2504.05346, applied to whole columns.
With A = H^-1 over the inputs that are left, losing the group g of columns and refitting all others
by least squares costs tr(W_g A_gg^-1 W_g^T) of output energy. The refitted weight is
W - W_g A_gg^-1 A_g, and the inverse for the next group is A - A_.g A_gg^-1 A_g. : so groups can
leave one after another, each priced in view of those already gone, and the weight after the last
one is the least-squares fit on the inputs that stay.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from thanos_deploy.errors import HessianError
from thanos_deploy.solver.layer import Factor
from thanos_deploy.solver.mask import cheapest


class Elimination:
    """A layer whose inputs leave one group after another.

    Attributes:
        weight: float64[rows, cols], refitted; zero in the columns that are gone.
        left: bool[cols], the inputs that are still there.
    """

    def __init__(self, weight: Tensor, H: Factor) -> None:
        """Start with all inputs.

        Args:
            weight: [rows, cols].
            H: the layer's Hessian, factored.
        """
        self.weight = weight.double()
        self.left = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        self._V = H.V.double()
        self._whole_inverse: Tensor | None = None
        # Of these the host reads nothing before it is asked, so that no removal waits for another.
        self._loss = self.weight.new_zeros(())
        self._solved = torch.ones((), dtype=torch.bool, device=weight.device)

    @property
    def _inverse(self) -> Tensor:
        """A, float64[cols, cols]; as costly as anything here, so made when it is asked for."""
        if self._whole_inverse is None:
            self._whole_inverse = self._V.T @ self._V
        return self._whole_inverse

    def branch(self) -> "Elimination":
        """A copy, from which other inputs may leave; A is made once for both."""
        _ = self._inverse
        return deepcopy(self)

    def _rows(self, columns: Tensor) -> Tensor:
        """Those of A; of few of them alone, if all inputs are still there."""
        if self._whole_inverse is None:
            return self._V[:, columns].T @ self._V
        return self._whole_inverse[columns]

    def _diagonal(self) -> Tensor:
        """That of A."""
        if self._whole_inverse is None:
            return self._V.square().sum(dim=0)
        return self._whole_inverse.diagonal()

    @property
    def loss(self) -> float:
        """Output energy lost so far, in the scale of the Hessian, damping included."""
        return float(self._loss)

    def require_solved(self) -> None:
        """Refuse what was made of inputs that depend on each other too much.

        Raises:
            HessianError: some of those that were removed do.
        """
        if not bool(self._solved):
            raise HessianError(
                f"some of the {len(self.left)} inputs of a layer depend on each other so "
                "strongly that the loss from removing them cannot be computed",
                fix="use more calibration samples (--nsamples) or more damping (--damp)",
            )

    def costs(self) -> Tensor:
        """What losing each single input would cost now; float64[cols], infinite for one gone."""
        energy = self.weight.square().sum(dim=0)
        return torch.where(self.left, energy / self._diagonal(), math.inf)

    def cost(self, columns: Tensor) -> float:
        """What losing these inputs together would cost now.

        Args:
            columns: int64[count].
        """
        return float(self._cost(columns))

    def _cost(self, columns: Tensor) -> Tensor:
        return self._cost_by(self._inverse[columns][:, columns], self.weight[:, columns])

    def _cost_by(self, A: Tensor, W: Tensor) -> Tensor:
        return (self._solve(A, W.T) * W.T).sum()

    def _solve(self, positive: Tensor, right: Tensor) -> Tensor:
        lower, failed = torch.linalg.cholesky_ex(positive)
        self._solved &= failed == 0
        return torch.cholesky_solve(right, lower)

    def remove(self, columns: Tensor, *, last: bool = False) -> None:
        """Take inputs away and refit the others.

        Args:
            columns: int64[count].
            last: no other input will be priced or taken away, so A is not kept up.
        """
        W = self.weight[:, columns]
        A = self._rows(columns) if last else self._inverse[columns]
        shared = self._solve(A[:, columns], A)  # A_gg^-1 A_g, float64[count, cols]
        self._loss = self._loss + self._cost_by(A[:, columns], W)
        self.weight = self.weight - W @ shared
        self.left.index_fill_(0, columns, False)
        # What is zero but for rounding; an identity keeps the rest of the algebra as it is.
        gone = ~self.left
        self.weight.masked_fill_(gone, 0.0)
        if last:
            return
        self._whole_inverse = self._inverse - A.T @ shared
        self._inverse.masked_fill_(gone[:, None], 0.0).masked_fill_(gone, 0.0)
        self._inverse.diagonal().masked_fill_(gone, 1.0)

    def channel_losses(self) -> Tensor:
        """What losing 0, 1, 2, ... single inputs would cost, the cheapest first.

        The order is that of `drop_channels`. With the inputs in this order and A = L L^T, the loss
        of the first k is the sum of squares of the first k rows of L^-1 W^T: one factorisation
        prices all of them.

        Returns:
            float64[cols + 1], rising.
        """
        order = self.costs().sort(stable=True).indices
        lower = torch.linalg.cholesky(self._inverse[order][:, order])
        rows = torch.linalg.solve_triangular(lower, self.weight[:, order].T, upper=False)
        return nn.functional.pad(rows.square().sum(dim=1).cumsum(dim=0), (1, 0))

    def drop_channels(self, count: int) -> None:
        """Remove single inputs, the cheapest at this moment, until so many are left, and end.

        Raises:
            HessianError: see `require_solved`.
        """
        self.remove(cheapest(self.costs(), int(self.left.sum()) - count), last=True)
        self.require_solved()

    def drop_heads(self, there: tuple[int, int], *, keep: tuple[int, int]) -> Tensor:
        """Remove attention heads, the cheapest first, priced anew each time.

        Either whole groups of query heads that share a key-value head, or the same number of query
        heads from each group, one of each in turn: both leave groups of equal size, as attention
        kernels want them. Heads that are gone already count, and those that go for a smaller number
        include those that go for a larger one.

        Args:
            there: query heads and key-value heads that there were; each query head is a run of
                inputs.
            keep: the same, that stay.

        Returns:
            int64[kept query heads], those that stay, rising.

        Raises:
            HessianError: see `require_solved`.
        """
        (heads, kv_heads), (keep_heads, keep_kv_heads) = there, keep
        group, size = heads // kv_heads, len(self.left) // heads
        if keep_kv_heads < kv_heads:  # one pool, from which any group of heads may go
            length, pool, target = group * size, kv_heads, keep_kv_heads
        else:  # every group is a pool, from which the same number of heads goes
            length, pool, target = size, group, keep_heads // keep_kv_heads
        runs = torch.arange(len(self.left), device=self.left.device).reshape(-1, length)
        # All pools have the same number of runs, so the host knows how often one goes from each.
        most = int(self.left[runs[:, 0]].reshape(-1, pool).sum(dim=1).max())
        for _ in range(most - target):
            ended = self.left[runs[:, 0]].reshape(-1, pool).sum(dim=1, keepdim=True) - 1
            for _ in range(len(ended)):
                there_still = self.left[runs[:, 0]].reshape(-1, pool)
                offered = there_still & (there_still.sum(dim=1, keepdim=True) > ended)
                prices = torch.stack([self._cost(run) for run in runs])
                prices = torch.where(offered.flatten(), prices, math.inf)
                self.remove(runs.index_select(0, cheapest(prices, 1)).flatten())
        self.require_solved()
        return self.left[::size].nonzero().flatten()
