"""Choose the kernels for a loaded weight, and bring the weight into their layout.

On a CPU there is one kernel. On a GPU it is chosen by measurement for each shape and number of
tokens, as for the engine `torch:sparse`; see `runtime.kernels.choice`. Unlike there, the dense
product is not a candidate, because it would need the dense weight beside the packed one.
"""

from torch import Tensor

from runtime.kernels import blockwise, choice, kernel_times
from runtime.kernels.operator import Held
from thanos_deploy.model.packing import unpack_anywhere


def held_by(values: Tensor, mask: Tensor, name: str) -> Held:
    """Bring a packed weight into the layout of this machine's kernels.

    Args:
        values: [outputs, inputs / 2], on the device that is to hold the weight.
        mask: uint8[outputs, ceil(inputs / 8)]; see `thanos_deploy.model.packing`.
        name: name of the layer, for messages.
    """
    if values.device.type == "cpu":
        return Held("blockwise", blockwise.from_packed(values, mask), len(values))
    weight = unpack_anywhere(values, mask, 2 * values.shape[1])
    return choice.held_by(_chosen(weight, name), weight, name)


def _chosen(weight: Tensor, name: str) -> tuple[str, ...]:
    """The kernel for each bucket of tokens; measured unless a file has the measurements."""
    shape = choice.Shape.of(weight, name)
    rows = kernel_times.rows_here([shape], weight.device, None)
    return choice.fastest([one for one in rows[shape].timed if one.kernel != choice.DENSE])
