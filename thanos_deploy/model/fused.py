"""Matrices of experts that files keep together in one tensor, as those of gpt_oss do.

The files have what the library has: `gate_up_proj`, [experts, hidden size, 2 x channels], whose
last axis has a gate and what it gates in turns; `down_proj`, [experts, channels, hidden size]; and
the biases, `gate_up_proj_bias` and `down_proj_bias`, without the middle axis. All else goes by the
matrices of single experts, so `weights` reads and writes those as parts of the tensors.

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
    """One expert's matrix or bias, in a tensor of a file.

    Attributes:
        tensor: name of that.
        expert: number of the expert.
        first, step: of the tensor's last axis, which entries are its outputs.
        is_bias: it is a bias.
    """

    tensor: str
    expert: int
    first: int
    step: int
    is_bias: bool

    def read(self, file: TensorFile) -> Tensor:
        """[outputs, inputs], or [outputs]."""
        return self._of(self._expert(file)).contiguous()

    def write(self, file: TensorFile, value: Tensor) -> None:
        """Put [outputs, inputs], or [outputs], beside what else the tensor has of the expert."""
        whole = self._expert(file)
        self._of(whole).copy_(value)
        file.write(self.tensor, whole, self.expert * whole.numel())

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """Its own, in a tensor of a shape."""
        outputs = tensor[-1] // self.step
        return (outputs,) if self.is_bias else (outputs, tensor[1])

    def _expert(self, file: TensorFile) -> Tensor:
        """All that the tensor has of the expert."""
        _, (_, *sides) = file.kinds[self.tensor]
        size = 1
        for side in sides:
            size *= side
        start = self.expert * size
        return file.read(self.tensor, start, start + size).reshape(sides)

    def _of(self, whole: Tensor) -> Tensor:
        """A view of the part."""
        outputs = whole[..., self.first :: self.step]
        return outputs if self.is_bias else outputs.T


def parts_of(found: Mapping[str, Entry], names: Experts) -> dict[str, Part]:
    """The parts of all tensors of experts that files hold.

    Args:
        found: what they hold, by name.
        names: of the layers of an expert.

    Returns:
        what the part would be called in a file of its own -> the part.
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
    """The shapes of the tensors that parts make up.

    Args:
        parts: each with its shape; those of one tensor have one shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part, (outputs, *inputs) in parts:
        experts = max(part.expert + 1, shapes.get(part.tensor, (0,))[0])
        shapes[part.tensor] = (experts, *inputs, part.step * outputs)
    return shapes
