"""Remove a layer's inputs group by group, and refit the inputs that stay.

Source: the multi-weight lemma of Ilin and Richtarik, arXiv 2504.05346, applied to whole columns.
Let A = H^-1 over the remaining inputs, A_g the rows and A_gg the block of A at the group g, and W_g
the columns of W at g. Removing g and refitting all other columns by least squares costs
tr(W_g A_gg^-1 W_g^T) of output energy. The refitted weight is W - W_g A_gg^-1 A_g, and the inverse
for the next removal is A - A_g^T A_gg^-1 A_g. So groups can be removed one after another, each
priced given the removals before it. The weight after the last removal is the least-squares fit on
the inputs that stay.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from thanos_deploy.errors import HessianError
from thanos_deploy.solver.layer import Factor
from thanos_deploy.solver.mask import cheapest


class Elimination:
    """A layer whose inputs are removed one group after another.

    Attributes:
        weight: float64[rows, cols], refitted; zero in the removed columns.
        left: bool[cols], True for the inputs that remain.
    """

    def __init__(self, weight: Tensor, H: Factor) -> None:
        """Start with all inputs.

        Args:
            weight: [rows, cols].
            H: the factored Hessian of the layer.
        """
        self.weight = weight.double()
        self.left = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        self._V = H.V.double()
        self._whole_inverse: Tensor | None = None
        # These stay on the device until they are asked for, so no removal waits for the device.
        self._loss = self.weight.new_zeros(())
        self._solved = torch.ones((), dtype=torch.bool, device=weight.device)

    @property
    def _inverse(self) -> Tensor:
        """A, float64[cols, cols]; computed on first use, because it is as costly as any step."""
        if self._whole_inverse is None:
            self._whole_inverse = self._V.T @ self._V
        return self._whole_inverse

    def branch(self) -> "Elimination":
        """Return a copy from which other inputs can be removed; A is computed once for both."""
        _ = self._inverse
        return deepcopy(self)

    def _rows(self, columns: Tensor) -> Tensor:
        """Rows of A; computed directly from V while A itself has not been computed."""
        if self._whole_inverse is None:
            return self._V[:, columns].T @ self._V
        return self._whole_inverse[columns]

    def _diagonal(self) -> Tensor:
        """The diagonal of A."""
        if self._whole_inverse is None:
            return self._V.square().sum(dim=0)
        return self._whole_inverse.diagonal()

    @property
    def loss(self) -> float:
        """Output energy lost so far, in the scale of the Hessian, damping included."""
        return float(self._loss)

    def require_solved(self) -> None:
        """Refuse a result that involved inputs which depend on each other too strongly.

        Raises:
            HessianError: the block of A at a priced or removed group could not be factored.
        """
        if not bool(self._solved):
            raise HessianError(
                f"some of the {len(self.left)} inputs of a layer depend on each other so "
                "strongly that the loss from removing them cannot be computed",
                fix="use more calibration samples (--nsamples) or more damping (--damp)",
            )

    def costs(self) -> Tensor:
        """Cost of removing each single input now; float64[cols], infinite for removed inputs."""
        energy = self.weight.square().sum(dim=0)
        return torch.where(self.left, energy / self._diagonal(), math.inf)

    def cost(self, columns: Tensor) -> float:
        """Cost of removing these inputs together now.

        Args:
            columns: int64[count], the inputs.
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
        """Remove inputs and refit the others.

        Args:
            columns: int64[count], the inputs to remove.
            last: no other input will be priced or removed, so A need not be updated.
        """
        W = self.weight[:, columns]
        A = self._rows(columns) if last else self._inverse[columns]
        shared = self._solve(A[:, columns], A)  # A_gg^-1 A_g, float64[count, cols]
        self._loss = self._loss + self._cost_by(A[:, columns], W)
        self.weight = self.weight - W @ shared
        self.left.index_fill_(0, columns, False)
        # Removed columns are zero up to rounding; set them to exactly zero.
        gone = ~self.left
        self.weight.masked_fill_(gone, 0.0)
        if last:
            return
        self._whole_inverse = self._inverse - A.T @ shared
        # An identity block in place of the removed inputs keeps A positive definite.
        self._inverse.masked_fill_(gone[:, None], 0.0).masked_fill_(gone, 0.0)
        self._inverse.diagonal().masked_fill_(gone, 1.0)

    def channel_losses(self) -> Tensor:
        """Losses from removing the 0, 1, 2, ... cheapest inputs.

        The order is that of `drop_channels`. With the inputs in this order and A = L L^T, the loss
        from removing the first k is the sum of squares of the first k rows of L^-1 W^T, so one
        factorisation prices every count.

        Returns:
            float64[cols + 1], ascending.

        Raises:
            HessianError: see `require_solved`.
        """
        order = self.costs().sort(stable=True).indices
        lower, failed = torch.linalg.cholesky_ex(self._inverse[order][:, order])
        self._solved &= failed == 0
        self.require_solved()
        rows = torch.linalg.solve_triangular(lower, self.weight[:, order].T, upper=False)
        return nn.functional.pad(rows.square().sum(dim=1).cumsum(dim=0), (1, 0))

    def drop_channels(self, count: int) -> None:
        """Remove the cheapest inputs in one step so that `count` are left.

        This has to be the last removal, because A is not updated.

        Raises:
            HessianError: see `require_solved`.
        """
        self.remove(cheapest(self.costs(), int(self.left.sum()) - count), last=True)
        self.require_solved()

    def drop_heads(self, there: tuple[int, int], *, keep: tuple[int, int]) -> Tensor:
        """Remove attention heads, the cheapest first, with new prices after each removal.

        If key-value heads are to be removed, each removal takes a key-value head with all of its
        query heads. Otherwise it takes one query head, and every group of query heads that share a
        key-value head loses one in turn. Both leave groups of equal size, as attention kernels
        require. Heads removed by earlier calls count, and the heads removed to keep fewer include
        those removed to keep more.

        Args:
            there: numbers of query heads and key-value heads before any removal; each query head
                is a run of inputs.
            keep: numbers of query heads and key-value heads to keep.

        Returns:
            int64[kept query heads], the numbers of the query heads that stay, ascending.

        Raises:
            HessianError: see `require_solved`.
        """
        (heads, kv_heads), (keep_heads, keep_kv_heads) = there, keep
        group, size = heads // kv_heads, len(self.left) // heads
        if keep_kv_heads < kv_heads:  # one pool, from which any group of heads may be removed
            length, pool, target = group * size, kv_heads, keep_kv_heads
        else:  # every group is a pool, and each loses the same number of heads
            length, pool, target = size, group, keep_heads // keep_kv_heads
        runs = torch.arange(len(self.left), device=self.left.device).reshape(-1, length)
        # All pools have the same number of runs left, so the host reads the number of rounds once.
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
