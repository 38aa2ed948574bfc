"""Walk a model block by block: calibrate, prune, write back, go on with the pruned block.

Each block sees the calibration data as the already pruned blocks before it pass it on. Only one
block's weights are in memory at a time.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from thanos_deploy import methods
from thanos_deploy.calibrate import Statistics, Walk, advance, block_inputs, collect
from thanos_deploy.checkpoint import Checkpoint, WeightsCopy, copy_companions
from thanos_deploy.errors import ModelError
from thanos_deploy.hessian import retarget
from thanos_deploy.layer import LayerProblem
from thanos_deploy.methods import Method, Option
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.verdict import judge

logger = logging.getLogger(__name__)

# Tokens per forward pass: enough to keep the cores busy, little enough to stay in their caches.
TOKENS_PER_BATCH = 2048

# Holds a layer near its own weight when it aims at the dense model's output.
RETARGET_DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned linear layer, as it was written.

    Attributes:
        name: full name in the model.
        rows, cols: outputs and inputs.
        sparsity: fraction of zeros.
        pattern_holds: the written weight keeps the pattern everywhere.
        relative_error: fraction of the energy of the output that the layer aims at, on the
            calibration data, that the pruned weight misses.
        damping: what the method used.
        seconds: time that the method took.
    """

    name: str
    rows: int
    cols: int
    sparsity: float
    pattern_holds: bool
    relative_error: float
    damping: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block: its layers and where the time went.

    Attributes:
        layers: reports of its linear layers.
        collect_seconds: forward passes through the block as far as the layers, with statistics.
        solve_seconds: the pruning method, all layers.
        forward_seconds: forward pass through the pruned block, for the blocks after it.
    """

    layers: tuple[LayerReport, ...]
    collect_seconds: float
    solve_seconds: float
    forward_seconds: float


def prune(
    checkpoint: Checkpoint,
    segments: Tensor,
    destination: Path,
    *,
    pattern: Pattern,
    method: str,
    options: Mapping[str, Option],
    true_sequential: bool = False,
    dense_target: float = 0.0,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress = silent,
) -> list[BlockReport]:
    """Prune every linear layer of every block and write an ordinary model folder.

    Embeddings, norms, biases and the output head are copied.

    Args:
        checkpoint: the dense model.
        segments: int64[count, length], calibration tokens.
        destination: an empty folder for the pruned model.
        pattern: what to prune to.
        method: name of a method.
        options: the method's options.
        true_sequential: collect the statistics of each group of layers after the groups before it
            in the block are pruned, instead of all from the dense block.
        dense_target: how far each layer aims at the output that it has in the dense model rather
            than at its own output on the pruned model's inputs; see `hessian.retarget`.
        dtype: what to store, or None to keep each tensor's own.
        on_progress: told of every finished block.

    Raises:
        ModelError: weights are missing, have NaN, or do not fit the pattern.
        HessianError: the calibration statistics cannot be used.
    """
    check(checkpoint, pattern=pattern, method=method, options=options)
    family, solver = checkpoint.family, methods.load(method)
    copy_companions(checkpoint.folder, destination, dtype)
    with torch.no_grad(), WeightsCopy(checkpoint.weights, destination, dtype) as copy:
        model = checkpoint.skeleton()
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        files = _Files(checkpoint, copy, model.base_model_prefix)

        files.load(model.base_model, f"{model.base_model_prefix}.", skip=family.blocks)
        batch = max(1, TOKENS_PER_BATCH // segments.shape[1])
        batches = block_inputs(model, family, segments.split(batch))
        dense_batches = [replace(data) for data in batches] if dense_target else []
        model.get_input_embeddings().to("meta")

        reports = []
        on_progress(0, len(blocks))
        for index, block in enumerate(blocks):
            prefix = f"{family.blocks}.{index}."
            files.load(block, prefix)
            walk, dense, clock = Walk(index, block, batches), None, _Clock()
            if dense_target:
                dense = Walk(index, deepcopy(block), dense_batches)
            layers: list[LayerReport] = []
            for groups in (
                [[group] for group in family.inputs] if true_sequential else [family.inputs]
            ):
                with clock.measure("collect"):
                    statistics = collect(walk, [group[0] for group in groups], dense)
                with clock.measure("solve"):
                    for group in groups:
                        layers += (
                            _prune_layer(
                                block.get_submodule(name),
                                prefix + name,
                                statistics[group[0]],
                                pattern=pattern,
                                solver=solver,
                                options=options,
                                dense_target=dense_target,
                                dtype=files.dtype(f"{prefix}{name}.weight"),
                            )
                            for name in group
                        )
            if index + 1 < len(blocks):
                with clock.measure("forward"):
                    for path in (walk, dense):
                        if path is not None:
                            advance(path)
            files.store(block, prefix)
            block.to("meta")
            reports.append(
                BlockReport(
                    layers=tuple(layers),
                    collect_seconds=clock.seconds["collect"],
                    solve_seconds=clock.seconds["solve"],
                    forward_seconds=clock.seconds["forward"],
                )
            )
            logger.info(
                "block %d: largest relative error %.4f, %.1f s",
                index,
                max(layer.relative_error for layer in layers),
                sum(clock.seconds.values()),
            )
            on_progress(index + 1, len(blocks))
        files.copy_rest()
    return reports


def _prune_layer(
    linear: nn.Module,
    name: str,
    statistics: Statistics,
    *,
    pattern: Pattern,
    solver: Method,
    options: Mapping[str, Option],
    dense_target: float,
    dtype: torch.dtype,
) -> LayerReport:
    """Prune one layer in place.

    What the following layers and blocks see is what is written, rounding to `dtype` included.
    """
    assert isinstance(linear, nn.Linear)
    started = time.perf_counter()
    problem = LayerProblem(linear.weight, statistics.hessian, name)
    if statistics.cross is not None:
        weight = retarget(problem, statistics.cross, dense_target, RETARGET_DAMPING)
        problem = LayerProblem(weight, statistics.hessian, name)
    result = solver.prune(problem, pattern, **options)
    seconds = time.perf_counter() - started
    stored = _stored(result.weight, dtype, name)
    linear.weight.copy_(stored)
    verdict = judge((stored != 0).numpy(), pattern)
    return LayerReport(
        name=name,
        rows=linear.out_features,
        cols=linear.in_features,
        sparsity=verdict.sparsity,
        pattern_holds=verdict.holds,
        relative_error=result.relative_error,
        damping=result.damping,
        seconds=seconds,
    )


class _Clock:
    """Seconds by activity."""

    def __init__(self) -> None:
        self.seconds = {"collect": 0.0, "solve": 0.0, "forward": 0.0}

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[activity] += time.perf_counter() - started


def check(
    checkpoint: Checkpoint, *, pattern: Pattern, method: str, options: Mapping[str, Option]
) -> None:
    """Refuse, before anything is computed, layers that the method cannot prune.

    Raises:
        ModelError: a layer is missing or does not fit the pattern.
        UsageError: the options do not fit the method or the pattern.
    """
    refuse = methods.load(method).check
    for name, (_, cols) in linear_shapes(checkpoint).items():
        refuse(name, cols, pattern, **options)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Full name -> (rows, cols) of every linear layer that pruning visits, from the headers.

    Raises:
        ModelError: the weights lack one.
    """
    prefix = checkpoint.family.blocks.partition(".")[0]
    shapes = {}
    for index in range(checkpoint.config.num_hidden_layers):
        for linear in checkpoint.family.linears:
            name = f"{checkpoint.family.blocks}.{index}.{linear}"
            rows, cols = checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight", prefix)]
            shapes[name] = (rows, cols)
    return shapes


class _Files:
    """Moves parameters between a model without storage, its checkpoint, and the pruned copy."""

    def __init__(self, checkpoint: Checkpoint, copy: WeightsCopy, prefix: str) -> None:
        self._checkpoint = checkpoint
        self._copy = copy
        self._prefix = prefix

    def load(self, module: nn.Module, prefix: str, *, skip: str | None = None) -> None:
        """Give a module its weights, in float32; `skip` names a submodule, by its full name."""
        stored = {
            name: self._stored_name(prefix + name)
            for name, _ in module.named_parameters()
            if skip is None or not f"{prefix}{name}".startswith(f"{skip}.")
        }
        tensors = self._checkpoint.weights.read(stored.values())
        for name, source in stored.items():
            shape = tuple(module.get_parameter(name).shape)
            if tensors[source].shape != shape:
                raise ModelError(
                    f"{self._checkpoint.folder}: {source} has shape "
                    f"{tuple(tensors[source].shape)}, config.json says {shape}",
                    fix="use the config.json and the weights of the same checkpoint",
                )
        state = {name: tensors[source].float() for name, source in stored.items()}
        module.load_state_dict(state, strict=False, assign=True)

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which a parameter will be written."""
        return self._copy.dtype(self._stored_name(parameter))

    def store(self, module: nn.Module, prefix: str) -> None:
        """Write all parameters of a module."""
        for name, parameter in module.named_parameters():
            target = self._stored_name(prefix + name)
            self._copy.write(target, _stored(parameter, self._copy.dtype(target), target))

    def copy_rest(self) -> None:
        """Write what has not been written yet as it is in the checkpoint."""
        for name in self._copy.missing:
            tensor = self._checkpoint.weights.read([name])[name]
            if tensor.dtype != self._copy.dtype(name):
                tensor = _stored(tensor, self._copy.dtype(name), name)
            self._copy.write(name, tensor)

    def _stored_name(self, parameter: str) -> str:
        return self._checkpoint.stored_name(parameter, self._prefix)


def _stored(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight as it is written: cast, and without -0.0.

    Kernels that compress 2:4 weights by their bit patterns take -0.0 for a value (vLLM pull
    request 13198), and a small negative weight can become one in the cast.

    Raises:
        ModelError: a value does not fit the dtype.
    """
    stored = weight.to(dtype, copy=True).add_(0.0)
    if not bool(stored.isfinite().all()):
        raise ModelError(
            f"{name}: values up to {weight.abs().max().item():g} do not fit {dtype}",
            fix="use --dtype bf16 or fp32",
        )
    return stored
