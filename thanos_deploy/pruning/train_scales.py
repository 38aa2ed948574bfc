"""Train the scales of a quantised model, with the dense model as the teacher.

Codes and zero points stay fixed. Training changes only one scale for every group, so little text is
enough. Layers and blocks were quantised one at a time, each towards its own output; only here does
the whole model learn what the next token should be. The model always runs on the grid, with scales
that every format can hold. Gradients pass through the rounding of scales as if it were the
identity.

Every rank holds all scales and takes the same steps; for the rest see `recover`.

Source of the idea: the second phase of Chen et al., "EfficientQAT: Efficient Quantization-Aware
Training for Large Language Models", arXiv 2407.11062. Here the target is the teacher's distribution
rather than the text.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import turned
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.codes import Codes, save, tensors_of
from thanos_deploy.pruning.recover import distil, write
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.pruning.straight_through import by_scale
from thanos_deploy.pruning.training_journal import TrainingJournal
from thanos_deploy.ranks.sharded import Part, Sharded
from thanos_deploy.solver.codes import Quantised, by_column, holdable

# Learning rate of the first step after the warm-up, as a fraction of a scale. Chosen on held-out C4
# documents with SmolLM2-135M at int4 in groups of 32; see benchmarks/LOG.md.
_RATE = 3e-3


def train_scales(
    quantised: Checkpoint,
    codes: Codes,
    dense: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    new_codes: Path | None,
    *,
    count: int,
    seed: int = 0,
    device: torch.device = CPU,
    journal: TrainingJournal | None = None,
    on_progress: OnProgress = silent,
) -> Recovery:
    """Train the scales of a quantised model towards the dense one, and write it and its codes.

    Args:
        quantised: the model to train.
        codes: its codes.
        dense: the dense model that it was made from.
        segments: int64[available, length], tokens to train on.
        destination: an empty folder for the model; None for a rank that writes nothing.
        new_codes: an empty folder for the new files of codes; None for a rank that writes nothing.
        count: number of segments to train on; if it exceeds `available`, segments are repeated.
        seed: seed of the order of the segments.
        device: where both models are.
        journal: journal from which an interrupted training continues; None to start from the
            beginning and keep nothing.
        on_progress: called after every step.

    Raises:
        InputError: the codes do not match the weights of the model.
        ModelError: a model does not load, or a value does not fit its dtype.
        ResourceError: both models do not fit into the GPU's memory.
    """
    layers = {name: codes.of(name, quantised.linear(name)) for name in quantised.linears}
    students: list[Scales] = []

    def student_of(learner: Sharded) -> Scales:
        students.append(Scales(learner, layers))
        return students[0]

    learner, lesson = distil(
        quantised,
        dense,
        segments,
        student_of,
        count=count,
        seed=seed,
        device=device,
        journal=journal,
        on_progress=on_progress,
    )
    started = time.perf_counter()
    write(learner, quantised, destination)
    if new_codes is not None:
        trained = students[0].layers
        for index, block in enumerate(quantised.blocks):
            tensors = [tensors_of(name, trained[name]) for name in block.full_names]
            save(new_codes, index, codes.grid, {k: v for one in tensors for k, v in one.items()})
    return replace(lesson, seconds=lesson.seconds + time.perf_counter() - started)


class Scales:
    """The scales of a quantised model as a `student.Student`."""

    rate = _RATE
    derived: Sequence[Part] = ()

    def __init__(self, learner: Sharded, layers: Mapping[str, Quantised]) -> None:
        """Begin with the scales of the quantised layers.

        Args:
            learner: the model to train.
            layers: the quantised layers, by name.
        """
        self._learner, device = learner, learner.model.device
        self._start = {
            name: Quantised(
                layer.grid,
                layer.codes.to(device),
                layer.scale.to(device),
                layer.zero.to(device),
            )
            for name, layer in layers.items()
        }
        self._factors = {name: torch.ones_like(one.scale) for name, one in self._start.items()}
        self.learned = [Part(one) for one in self._factors.values()]

    @property
    def layers(self) -> dict[str, Quantised]:
        """The layers with their current scales, by name."""
        return {name: self._layer(name) for name in self._start}

    def set_gradients(self) -> None:
        """See `Student`."""
        for name, start in self._start.items():
            stored = f"{name}.weight"
            whole = self._learner.whole(self._learner.gradient(stored), stored)
            gradient = turned(self._learner.model.get_submodule(name), whole)
            zeros = by_column(start.zero, start.grid, gradient.shape[1])
            pulled = by_scale(gradient, start.codes - zeros, start.grid)
            self._factors[name].grad = (start.scale * pulled).contiguous()

    def resume(self) -> None:
        """See `Student`."""
        self.update_weights()

    def update_weights(self) -> None:
        """See `Student`."""
        for name in self._start:
            weight = turned(self._learner.model.get_submodule(name), self._layer(name).weight)
            self._learner.put(f"{name}.weight", weight)

    def _layer(self, name: str) -> Quantised:
        start = self._start[name]
        scale = holdable(self._factors[name] * start.scale, start.grid)
        return Quantised(start.grid, start.codes, scale, start.zero)
