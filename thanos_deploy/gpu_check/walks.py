"""Pruning of a whole model on the GPU: agreement with the CPU, time per block, and memory."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos_deploy.calibration.journal import Journal
from thanos_deploy.gpu.rows import CheckRow, Row, WalkRow
from thanos_deploy.gpu_check import models
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedBlock

_METHOD, _PATTERN = "thanos", SemiStructured(2, 4)

# The presets that are timed.
PRESETS = ("fast", "best")

# Largest number of tuning steps in these runs.
_STEPS = 16

# Relative change of the embeddings that imitates rounding: about the difference that float32 sums
# in another order make in a layer's inputs. Choices in the first block affect the next one, so even
# this changes a percent or more of the mask entries on the CPU alone.
_ROUNDING = 1e-6

# GPU and CPU may differ this many times as much as rounding alone makes two prunings differ, and
# always by this fraction of the mask entries and of the error of a layer.
_TIMES, _ALLOWED = 3.0, 1e-2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the models to prune, and of the calibration data.

    Attributes:
        model: the timed model. Its vocabulary is small, because the embeddings stay on the host.
        segments: number and length in tokens of its calibration segments.
        seconds: time after which no further block is begun.
        compared: the small model that is pruned on the CPU too, on 8 segments of 128 tokens.
    """

    model: models.Sizes = field(default_factory=lambda: models.Sizes(blocks=4, vocabulary=1024))
    segments: tuple[int, int] = (128, 2048)
    seconds: float = 20.0
    compared: models.Sizes = field(
        default_factory=lambda: models.Sizes(
            hidden=256, channels=704, heads=4, kv_heads=2, head_size=64, blocks=2, vocabulary=512,
            dtype="fp32",
        )
    )  # fmt: skip


class _TimeIsUpError(Exception):
    """Raised to end a pruning run whose time is up."""


def rows(preset: str, sizes: Sizes, task: Task) -> Iterator[Row]:
    """Yield the comparison with the CPU, then time and memory of each block of the timed model."""
    yield compare(preset, sizes.compared, task)
    folder = task.folder / "model"
    make(folder, sizes.model, task.device)
    yield from timed(preset, folder, sizes, task)


def make(folder: Path, sizes: models.Sizes, device: str) -> None:
    """Write a model of random weights to a folder."""
    models.make("dense", sizes, device).save_pretrained(folder)


def random_segments(count: int, length: int, vocabulary: int) -> Tensor:
    """Return random token ids, int64[count, length], the same ones in every call."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def compare(preset: str, sizes: models.Sizes, task: Task) -> CheckRow:
    """Prune a small model on this device and on the CPU, and compare masks and layer errors.

    The limits follow from a third pruning: the same model on the CPU, with embeddings that were
    changed by as much as rounding.
    """
    dense, rounded = task.folder / "compared", task.folder / "rounded"
    make(dense, sizes, "cpu")
    make_rounded(rounded, sizes)
    segments = random_segments(8, 128, sizes.vocabulary)
    recipe = _recipe(preset, calib_forward="fp32")

    def pruned(model: Path, device: str, name: str) -> tuple[Checkpoint, list[PrunedBlock]]:
        out = task.folder / name
        out.mkdir()
        blocks = prune(Checkpoint.open(model), segments, out, recipe, device=torch.device(device))
        return Checkpoint.open(out), blocks

    expected = pruned(dense, "cpu", "pruned on the CPU")
    mask, error = difference(*expected, *pruned(dense, task.device, "pruned here"))
    usual = difference(*expected, *pruned(rounded, "cpu", "pruned after rounding"))
    most = limits(usual)
    agrees = mask <= most[0] and error <= most[1]
    return CheckRow(
        f"walk:{preset}",
        f"{sizes.blocks} blocks of {sizes.hidden} against the CPU",
        "PASS" if agrees else "FAIL",
        f"{mask:.1e} of the masks differ, limit {most[0]:.1e}; the errors of layers differ "
        f"by {error:.1e}, limit {most[1]:.1e}",
        ""
        if agrees
        else "prune on the CPU, and report this with the name of the GPU and the versions of "
        "the packages",
    )


def _recipe(preset: str, **given: Any) -> Recipe:
    """Return the recipe of a preset with few tuning steps, since all steps take equally long."""
    recipe = Recipe.of(_PATTERN, method=_METHOD, preset=preset, **given)
    walk = replace(recipe.walk, tune_steps=min(_STEPS, recipe.walk.tune_steps))
    return replace(recipe, walk=walk)


def make_rounded(folder: Path, sizes: models.Sizes) -> None:
    """Write the model of `make`, with embeddings that are changed by as much as rounding."""
    model = models.make("dense", sizes, "cpu")
    weight = model.model.embed_tokens.weight
    noise = torch.randn(
        weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0)
    )
    weight.mul_(1 + _ROUNDING * noise)
    model.save_pretrained(folder)


def limits(usual: tuple[float, float]) -> tuple[float, float]:
    """Return the largest allowed differences of the masks and of the layer errors.

    Args:
        usual: `difference` between the pruned models of `make` and `make_rounded`.
    """
    mask, error = (max(_ALLOWED, _TIMES * found) for found in usual)
    return mask, error


def difference(
    one: Checkpoint,
    expected: Sequence[PrunedBlock],
    other: Checkpoint,
    found: Sequence[PrunedBlock],
) -> tuple[float, float]:
    """Return the differing fraction of the masks, and the largest relative error difference.

    Args:
        one, other: two pruned models with the same layers.
        expected, found: records of the layers of `one` and of `other`.
    """
    differs = entries = 0
    for name in one.linears:
        stored = one.stored_name(f"{name}.weight")
        masks = [model.weights.read([stored])[stored] == 0 for model in (one, other)]
        differs += int((masks[0] != masks[1]).sum())
        entries += masks[0].numel()
    errors = [
        abs(layer.relative_error / beside.relative_error - 1.0)
        for block, same in zip(expected, found, strict=True)
        for beside, layer in zip(block.layers, same.layers, strict=True)
        if beside.relative_error > 0.0
    ]
    return differs / entries, max(errors, default=0.0)


def timed(preset: str, folder: Path, sizes: Sizes, task: Task) -> Iterator[WalkRow]:
    """Prune as many blocks of a model as there is time for, and yield time and memory of each.

    The blocks are pruned as by the command `prune`, journal included.
    """
    device = torch.device(task.device)
    recipe = _recipe(preset)
    segments = random_segments(*sizes.segments, sizes.model.vocabulary)
    started = time.monotonic()

    def stop_in_time(done: int, total: int) -> None:
        if done and time.monotonic() - started > sizes.seconds:
            raise _TimeIsUpError

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    out = task.folder / "pruned"
    out.mkdir()
    journal = Journal(task.folder / "journal", {}, PrunedBlock)
    checkpoint = Checkpoint.open(folder)
    with suppress(_TimeIsUpError):
        prune(
            checkpoint,
            segments,
            out,
            recipe,
            device=device,
            journal=journal,
            on_progress=stop_in_time,
        )
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    for index, block in enumerate(journal.reports):
        yield WalkRow(
            method=_METHOD,
            preset=preset,
            pattern=str(_PATTERN),
            hidden=sizes.model.hidden,
            channels=sizes.model.channels,
            tokens=segments.numel(),
            block=index,
            seconds=dict(block.seconds),
            memory_bytes=held,
            host_bytes=environment.peak_memory_bytes(),
        )
