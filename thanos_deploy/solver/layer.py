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
        diagonal: [cols], that of H with its damping.
        V: [cols, cols], upper triangular, V^T V = the inverse of H with its damping.
        damping: the fraction of damping that it took.
    """

    diagonal: Tensor
    V: Tensor
    damping: float
    _diagonals: dict[int, Tensor] = field(default_factory=dict, init=False)

    def upper(self, columns: slice) -> Tensor:
        """U = V^-1, for which U U^T is H with its damping: some of its rows, in these columns.

        They are the inverse of what V has there, so the rest of the matrix is never needed.

        Args:
            columns: which rows and columns, one run of them.
        """
        own = self.V[columns, columns].double()
        identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
        inverse: Tensor = torch.linalg.solve_triangular(own, identity, upper=True)
        return inverse.to(self.V.dtype)

    def trailing_inverse_diagonals(self, step: int) -> Tensor:
        """Diagonals of the inverses of H[k step:, k step:] for every k.

        Returns:
            [ceil(cols / step), cols]; of row k, the entries from column k step on count.
        """
        if step not in self._diagonals:
            sums = [rows.square().sum(dim=0) for rows in self.V.split(step)]
            self._diagonals[step] = torch.stack(sums).flip(0).cumsum(dim=0).flip(0)
        return self._diagonals[step]


@dataclass(frozen=True, slots=True, eq=False)
class LayerProblem:
    """A linear layer and what calibration saw of its input.

    Attributes:
        weight: float32[rows, cols]; rows are outputs, columns are inputs.
        hessian: float32[cols, cols]; the sum of x x^T over the calibration tokens, undamped, in
            any positive scale. Its diagonal is the squared input norm that Wanda's score uses, so
            this one statistic serves every method. The paper's H is twice this one, which changes
            no result.
        name: the layer's name, for messages.
        factors: where factorisations of this Hessian are kept, by damping and mode, for the layers
            that read the same input; None if nobody else will ask for them.
        products: what a solver's steps may round the factors of their products to where that is
            faster: bfloat16 where the statistics are of bfloat16 numbers, float32 for not at all.
        divided: how the rows of the layer are divided, where `weight` has only some of them, or has
            them in runs; None for a layer as a whole. Only a method whose `divisible` says so gets
            such a problem.
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
    """What the outputs of some rows lose.

    Attributes:
        energy: ||W X||^2 of these rows.
        lost: ||(W' - W) X||^2 of them.
    """

    energy: float
    lost: float


def fraction_lost(losses: Sequence[Loss]) -> float:
    """The fraction of the output's energy that is lost; 0 of an output that is zero everywhere."""
    energy = sum(one.energy for one in losses)
    return sum(one.lost for one in losses) / energy if energy > 0.0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """A pruned layer.

    Attributes:
        weight: float32[rows, cols]; exactly +0.0 wherever `mask` is True.
        mask: bool[rows, cols]; True = removed.
        losses: of each run of rows, see `LayerProblem.divided`.
        damping: fraction that was added to the Hessian's diagonal to factor it; 0 where the
            method factors nothing.
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
        """With what the layer loses.

        Args:
            problem: the layer.
            weight, mask, damping: see the class.
            energy: `output_energy` of the layer, where it is known.
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
        """The fraction of the output's energy that is lost, see `relative_error`."""
        return fraction_lost(self.losses)


def without_update(problem: LayerProblem, mask: Tensor) -> LayerResult:
    """The layer with the masked weights set to zero and nothing else changed.

    Args:
        problem: the layer.
        mask: bool[rows, cols], True = removed.
    """
    return LayerResult.of(problem, torch.where(mask, 0.0, problem.weight), mask)


def output_energy(weight: Tensor, hessian: Tensor, division: Division | None = None) -> Tensor:
    """||W_i X||^2 of every row; [rows]."""
    product = weight @ hessian if division is None else division.product(weight, hessian)
    return product.mul_(weight).sum(dim=1)


def relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """||(after - before) X||_F^2 / ||before X||_F^2, from the undamped X X^T.

    A layer whose output is zero on all calibration tokens cannot lose anything: its error is 0.

    Args:
        before: float32[rows, cols].
        after: float32[rows, cols].
        hessian: float32[cols, cols], any positive scale.
    """
    whole = output_energy(before, hessian).sum().item()
    return output_energy(after - before, hessian).sum().item() / whole if whole > 0.0 else 0.0
