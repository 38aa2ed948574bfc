"""One linear layer as a pruning problem, and its solution."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    """

    weight: Tensor
    hessian: Tensor
    name: str
    factors: dict[tuple[float, str], Factor] | None = None
    products: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """A pruned layer.

    Attributes:
        weight: float32[rows, cols]; exactly +0.0 wherever `mask` is True.
        mask: bool[rows, cols]; True = removed.
        relative_error: fraction of the output's energy that changed, see `relative_error`.
        damping: fraction that was added to the Hessian's diagonal to factor it; 0 where the
            method factors nothing.
        energy: of the output, which `relative_error` is a fraction of; None where it is not known.
    """

    weight: Tensor
    mask: Tensor
    relative_error: float
    damping: float
    energy: float | None = None


def without_update(problem: LayerProblem, mask: Tensor) -> LayerResult:
    """The layer with the masked weights set to zero and nothing else changed.

    Args:
        problem: the layer.
        mask: bool[rows, cols], True = removed.
    """
    weight = torch.where(mask, 0.0, problem.weight)
    error = relative_error(problem.weight, weight, problem.hessian)
    return LayerResult(weight, mask, error, damping=0.0)


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """||W_i X||^2 of every row; [rows]."""
    return (weight @ hessian).mul_(weight).sum(dim=1)


def relative_error(
    before: Tensor, after: Tensor, hessian: Tensor, *, energy: Tensor | None = None
) -> float:
    """||(after - before) X||_F^2 / ||before X||_F^2, from the undamped X X^T.

    A layer whose output is zero on all calibration tokens cannot lose anything: its error is 0.

    Args:
        before: float32[rows, cols].
        after: float32[rows, cols].
        hessian: float32[cols, cols], any positive scale.
        energy: `output_energy` of `before`, where it is known.
    """
    whole = (output_energy(before, hessian) if energy is None else energy).sum().item()
    return output_energy(after - before, hessian).sum().item() / whole if whole > 0.0 else 0.0
