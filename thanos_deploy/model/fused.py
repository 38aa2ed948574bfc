"""Read and write the matrices of single experts in files that keep all experts in one tensor.

The files of gpt_oss have the tensors of transformers:

    gate_up_proj       [experts, hidden size, 2 x channels], with gate and up interleaved on the
                       last axis
    down_proj          [experts, channels, hidden size]
    gate_up_proj_bias  [experts, 2 x channels], interleaved likewise
    down_proj_bias     [experts, hidden size]

All other code works with the matrices of single experts. So `weights` reads and writes each of them
as a part of such a tensor.

Source: `GptOssExperts` in transformers' modeling_gpt_oss.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from thanos_deploy.model.experts import BIAS, DOWN, GATE_UP
from thanos_deploy.model.families import Experts
from thanos_deploy.model.tensorfile import Entry, TensorFile


@dataclass(frozen=True, slots=True)
class Part:
    """One expert's matrix or bias as a part of a tensor in a file.

    Attributes:
        tensor: name of the tensor.
        expert: number of the expert.
        first, step: first index and step, on the last axis of the tensor, of the outputs of the
            part.
        is_bias: whether the part is a bias.
    """

    tensor: str
    expert: int
    first: int
    step: int
    is_bias: bool

    def read(self, file: TensorFile) -> Tensor:
        """Read the part: [outputs, inputs], or [outputs] for a bias."""
        return self._of(self._expert(file)).contiguous()

    def write(self, file: TensorFile, value: Tensor) -> None:
        """Write the part, [outputs, inputs] or [outputs]; the rest of the tensor is kept."""
        whole = self._expert(file)
        self._of(whole).copy_(value)
        file.write(self.tensor, whole, self.expert * whole.numel())

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part, given the shape of the tensor."""
        outputs = tensor[-1] // self.step
        return (outputs,) if self.is_bias else (outputs, tensor[1])

    def _expert(self, file: TensorFile) -> Tensor:
        """Read the slice of the tensor that belongs to the expert."""
        _, (_, *sides) = file.kinds[self.tensor]
        size = 1
        for side in sides:
            size *= side
        start = self.expert * size
        return file.read(self.tensor, start, start + size).reshape(sides)

    def _of(self, whole: Tensor) -> Tensor:
        """Return a view of the part in the slice of its expert."""
        outputs = whole[..., self.first :: self.step]
        return outputs if self.is_bias else outputs.T


def parts_of(found: Mapping[str, Entry], names: Experts) -> dict[str, Part]:
    """List the parts of all expert tensors in the files.

    Args:
        found: the entries of the files, by name.
        names: the names of an expert's layers.

    Returns:
        maps the name that a part would have as a tensor of its own to the part.
    """
    return {
        f"{tensor.removesuffix(end)}{part.expert}.{layer}": part
        for tensor, entry in found.items()
        for end in (GATE_UP, DOWN, GATE_UP + BIAS, DOWN + BIAS)
        if tensor.endswith(f"{names.module}.{end}") and len(entry.shape) == 3 - end.endswith(BIAS)
        for layer, part in _parts(tensor, end, entry.shape[0], names)
    }


def _parts(tensor: str, end: str, experts: int, names: Experts) -> Iterator[tuple[str, Part]]:
    is_bias = end.endswith(BIAS)
    layers = (names.gate, names.up) if end.startswith(GATE_UP) else (names.down,)
    for expert in range(experts):
        for first, layer in enumerate(layers):
            name = f"{layer}.{'bias' if is_bias else 'weight'}"
            yield name, Part(tensor, expert, first, len(layers), is_bias)


def whole_shapes(parts: Iterable[tuple[Part, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that is made up of parts.

    Args:
        parts: each part with its shape; all parts of a tensor have the same shape.

    Returns:
        maps the name of a tensor to its shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part, (outputs, *inputs) in parts:
        experts = max(part.expert + 1, shapes.get(part.tensor, (0,))[0])
        shapes[part.tensor] = (experts, *inputs, part.step * outputs)
    return shapes
