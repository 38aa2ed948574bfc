"""A linear layer that gets another weight, and perhaps fewer inputs."""

import dataclasses

from torch import Tensor

from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix, replace
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.hessian import retarget
from thanos_deploy.solver.layer import Factor, LayerProblem, relative_error


class RefittedLayer:
    """A linear layer on its way to another weight, and perhaps to fewer inputs.

    Attributes:
        problem: the weight that it aims at and the Hessian of its input, in float64; around the
            means where it has a bias, which takes over what is lost on average.
    """

    def __init__(
        self,
        visit: Visit,
        name: str,
        statistics: Statistics,
        dense_target: float = 0.0,
        factors: dict[tuple[float, str], Factor] | None = None,
    ) -> None:
        """Begin with the layer as it is.

        Args:
            visit: the block.
            name: of the layer, seen from the block.
            statistics: of its input.
            dense_target: how far it aims at the output that it has in the dense model; see
                `hessian.retarget`.
            factors: see `LayerProblem`; of layers with a bias, or of layers without.
        """
        self._visit, self._name = visit, name
        self._layer = visit.block.get_submodule(name)
        self._bias = getattr(self._layer, "bias", None)
        used = statistics if self._bias is None else statistics.centred()
        weight = matrix(self._layer).double()
        problem = LayerProblem(weight, used.hessian.double(), visit.prefix + name, factors)
        self._mean = wanted = statistics.total.double() / statistics.mass
        if used.cross is not None:
            assert statistics.dense_total is not None
            dense = statistics.dense_total.double() / statistics.mass
            wanted = wanted + dense_target * (dense - wanted)
            aimed = retarget(problem, used.cross.double(), dense_target)
            problem = dataclasses.replace(problem, weight=aimed)
        self.problem = problem
        self._output = weight @ wanted

    def write(self, weight: Tensor, left: Tensor) -> float:
        """Give the layer a new weight, on the inputs that are left; return its relative error.

        Args:
            weight: float64[rows, cols], zero where an input is gone.
            left: bool[cols].
        """
        rounded = self._visit.stored(f"{self._name}.weight", weight)
        bias = None
        if self._bias is not None:
            change = self._output - rounded.double() @ self._mean
            bias = self._visit.stored(f"{self._name}.bias", self._bias + change.float()).float()
        replace(self._layer, rounded[:, left].float(), bias)
        return relative_error(self.problem.weight, rounded.double(), self.problem.hessian)


def spread(visit: Visit, name: str, owner: int) -> None:
    """Give all ranks the weight and the bias of a layer that one of them has refitted.

    Args:
        visit: the block.
        name: of the layer, seen from the block; of the same shape on all ranks.
        owner: whose.
    """
    if current().size == 1:
        return
    layer = visit.block.get_submodule(name)
    weight, bias = matrix(layer).contiguous(), getattr(layer, "bias", None)
    current().spread(weight, owner)
    if bias is not None:
        current().spread(bias.detach(), owner)
    replace(layer, weight, None if bias is None else bias.detach())
