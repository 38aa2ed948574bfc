"""Refit a linear layer: give it another weight, and perhaps fewer inputs."""

import dataclasses

from torch import Tensor

from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.model.linear import matrix, replace
from thanos_deploy.ranks.group import current
from thanos_deploy.solver.hessian import retarget
from thanos_deploy.solver.layer import Factor, LayerProblem, relative_error


class RefittedLayer:
    """A linear layer that is being refitted, perhaps to fewer inputs.

    Attributes:
        problem: the target weight and the Hessian of the layer's input, in float64. If the layer
            has a bias, the Hessian is taken around the mean of the input, because the bias takes up
            the mean error.
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
            name: name of the layer, relative to the block.
            statistics: statistics of its input.
            dense_target: 0 to 1, how far the target is moved towards the layer's output in the
                dense model; see `hessian.retarget`.
            factors: see `LayerProblem`. Layers with a bias and layers without must not share one,
                because their Hessians differ.
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
        """Replace the layer's weight, keep only some inputs, and correct the bias.

        Args:
            weight: float64[rows, cols], zero in the columns of removed inputs.
            left: bool[cols], True for the inputs that stay.

        Returns:
            the relative error with respect to the target weight.

        Raises:
            ModelError: a value does not fit the dtype in which it is stored.
        """
        rounded = self._visit.stored(f"{self._name}.weight", weight)
        bias = None
        if self._bias is not None:
            change = self._output - rounded.double() @ self._mean
            bias = self._visit.stored(f"{self._name}.bias", self._bias + change.float()).float()
        replace(self._layer, rounded[:, left].float(), bias)
        return relative_error(self.problem.weight, rounded.double(), self.problem.hessian)


def spread(visit: Visit, name: str, owner: int) -> None:
    """Broadcast the weight and the bias of a layer from the rank that has refitted it.

    Args:
        visit: the block.
        name: name of the layer, relative to the block; of the same shape on all ranks.
        owner: the rank that has refitted the layer.
    """
    if current().size == 1:
        return
    layer = visit.block.get_submodule(name)
    weight, bias = matrix(layer).contiguous(), getattr(layer, "bias", None)
    current().broadcast(weight, owner)
    if bias is not None:
        current().broadcast(bias.detach(), owner)
    replace(layer, weight, None if bias is None else bias.detach())
