"""One linear layer as a pruning problem, and its solution."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thanos_deploy.solver.division import Division


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The factored Hessian, in the dtype of the layer's weight.

    Attributes:
        diagonal: [cols], the diagonal of the damped H.
        V: [cols, cols], upper triangular; V^T V is the inverse of the damped H.
        damping: the fraction of damping that was used, after any retries.
    """

    diagonal: Tensor
    V: Tensor
    damping: float
    _diagonals: dict[int, Tensor] = field(default_factory=dict, init=False)

    def upper(self, columns: slice) -> Tensor:
        """Return a diagonal block of U = V^-1, for which U U^T is the damped H.

        It is the inverse of the same block of V, so the rest of U is never needed.

        Args:
            columns: the contiguous range of rows and columns of the block.
        """
        own = self.V[columns, columns].double()
        identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
        inverse: Tensor = torch.linalg.solve_triangular(own, identity, upper=True)
        return inverse.to(self.V.dtype)

    def trailing_inverse_diagonals(self, step: int) -> Tensor:
        """Diagonals of the inverses of H[k * step:, k * step:] for every k, computed once.

        Returns:
            [ceil(cols / step), cols]; in row k, only entries from column k * step on are valid.
        """
        if step not in self._diagonals:
            sums = [rows.square().sum(dim=0) for rows in self.V.split(step)]
            self._diagonals[step] = torch.stack(sums).flip(0).cumsum(dim=0).flip(0)
        return self._diagonals[step]


@dataclass(frozen=True, slots=True, eq=False)
class LayerProblem:
    """A linear layer and the calibration statistics of its input.

    Attributes:
        weight: float32[rows, cols]; rows are outputs, columns are inputs.
        hessian: float32[cols, cols]; the sum of x x^T over the calibration tokens, undamped, in
            any positive scale. Its diagonal is the squared input norm that Wanda's score uses, so
            this one statistic serves every method. The paper's H is twice this one, which changes
            no result.
        name: the layer's name, for messages.
        factors: cache of factorisations of this Hessian, by damping and mode, shared by the layers
            that read the same input; None to keep none.
        products: dtype to which a solver's steps may round the operands of matrix products where
            that is faster: bfloat16 if the statistics are of bfloat16 numbers, float32 for no
            rounding.
        divided: how the rows of the layer are divided, if `weight` holds only some of them or holds
            them in several runs; None for a whole layer. Only a method whose `divisible` returns
            True gets several runs.
    """

    weight: Tensor
    hessian: Tensor
    name: str
    factors: dict[tuple[float, str], Factor] | None = None
    products: torch.dtype = torch.float32
    divided: Division | None = None

    @property
    def division(self) -> Division:
        """How the rows of the layer are divided."""
        return Division.whole(len(self.weight)) if self.divided is None else self.divided


@dataclass(frozen=True, slots=True)
class Loss:
    """Output energy of some rows of a layer, and how much of it is lost.

    Attributes:
        energy: ||W X||^2 over these rows.
        lost: ||(W' - W) X||^2 over these rows, with W' the new weight.
    """

    energy: float
    lost: float


def fraction_lost(losses: Sequence[Loss]) -> float:
    """The fraction of the output energy that is lost; 0 if the output is zero everywhere."""
    energy = sum(one.energy for one in losses)
    return sum(one.lost for one in losses) / energy if energy > 0.0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """A pruned layer.

    Attributes:
        weight: float32[rows, cols]; exactly +0.0 wherever `mask` is True.
        mask: bool[rows, cols]; True = removed.
        losses: one for each run of rows on this rank; see `LayerProblem.divided`.
        damping: the fraction of damping used to factor the Hessian; 0 if the method factors
            nothing.
    """

    weight: Tensor
    mask: Tensor
    losses: tuple[Loss, ...]
    damping: float

    @classmethod
    def of(
        cls,
        problem: LayerProblem,
        weight: Tensor,
        mask: Tensor,
        *,
        damping: float = 0.0,
        energy: Tensor | None = None,
    ) -> "LayerResult":
        """Build the result of a layer and compute its losses.

        Args:
            problem: the layer.
            weight, mask, damping: see the class.
            energy: `output_energy` of the layer, if it is already known.
        """
        if energy is None:
            energy = output_energy(problem.weight, problem.hessian, problem.division)
        lost = output_energy(weight - problem.weight, problem.hessian, problem.division)
        losses = (
            Loss(energy[run].sum().item(), lost[run].sum().item()) for run in problem.division.runs
        )
        return cls(weight, mask, tuple(losses), damping)

    @property
    def relative_error(self) -> float:
        """The fraction of the output energy that is lost; see `fraction_lost`."""
        return fraction_lost(self.losses)


def without_update(problem: LayerProblem, mask: Tensor) -> LayerResult:
    """Set the masked weights of a layer to zero and change nothing else.

    Args:
        problem: the layer.
        mask: bool[rows, cols], True = removed.
    """
    return LayerResult.of(problem, torch.where(mask, 0.0, problem.weight), mask)


def output_energy(weight: Tensor, hessian: Tensor, division: Division | None = None) -> Tensor:
    """Output energy ||W_i X||^2 of every row; [rows]."""
    product = weight @ hessian if division is None else division.product(weight, hessian)
    return product.mul_(weight).sum(dim=1)


def relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """||(after - before) X||_F^2 / ||before X||_F^2, from the undamped X X^T.

    The error is 0 for a layer whose output is zero on all calibration tokens.

    Args:
        before: float32[rows, cols].
        after: float32[rows, cols].
        hessian: float32[cols, cols], any positive scale.
    """
    whole = output_energy(before, hessian).sum().item()
    return output_energy(after - before, hessian).sum().item() / whole if whole > 0.0 else 0.0
