"""Train the remaining weights of a pruned model, with the dense model as the teacher.

At every position of the calibration text, the pruned model learns the dense model's distribution of
the next token (knowledge distillation: Hinton, Vinyals and Dean, arXiv 1503.02531); the token that
really comes next plays no part. Only the weights of the blocks' linear layers are trained. A weight
that is zero stays zero, so every pattern survives.

Memory has to hold both models in float32 and, for each trained weight, its gradient and the two
moments of AdamW. The blocks of both models are sharded over the ranks (`ranks.sharded`). Matrix
products are in bfloat16 where the device multiplies it natively.

The sequences of a step are split into parts, which are the same for every number of ranks. Ranks
compute parts side by side, gradients are added up in the order of the parts, and each rank takes
the step for its shard of the weights. A `student.Student` defines what is trained: the weights
themselves, low-rank updates of them (`low_rank`), or the scales of a quantised model
(`train_scales`).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.head import Head, head_of, last_states, require_plain_head
from thanos_deploy.model.load import load_model
from thanos_deploy.model.rounding import rounded
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.low_rank import LowRank
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.pruning.student import KeptWeights, Student
from thanos_deploy.pruning.training_journal import Reached, TrainingJournal
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.schedule import even
from thanos_deploy.ranks.sharded import Part, Sharded

logger = logging.getLogger(__name__)

# Called after each step with its number, from 1 on, and the model.
Watch = Callable[[int, PreTrainedModel], None]


def unwatched(step: int, model: PreTrainedModel) -> None:
    """Do nothing: the default for `watch`."""


# These values measured best on held-out text; see benchmarks/LOG.md.
_TOKENS_A_STEP = 2048
_WARM_UP = 0.1  # fraction of the steps

# Largest number of parts that the sequences of a step are split into.
_PARTS = 4

# The state that AdamW keeps for each tensor, under AdamW's own names.
_MOMENTS = ("exp_avg", "exp_avg_sq")

# Tokens whose logits are computed at once, each with one float per entry of the vocabulary. Above
# 32 MB, glibc requests every tensor from the system anew.
_TOKENS_AT_ONCE = 128


def recover(
    pruned: Checkpoint,
    dense: Checkpoint,
    segments: Tensor,
    destination: Path | None,
    *,
    count: int,
    update_rank: int = 0,
    seed: int = 0,
    device: torch.device = CPU,
    journal: TrainingJournal | None = None,
    on_progress: OnProgress = silent,
    watch: Watch = unwatched,
) -> Recovery:
    """Train a pruned model towards the dense one, and write it in its own dtypes.

    Args:
        pruned: the model to train.
        dense: the dense model that it was made from.
        segments: int64[available, length], calibration tokens.
        destination: an empty folder; None for a rank that writes nothing.
        count: number of segments to train on; if it exceeds `available`, segments are repeated.
        update_rank: rank of the low-rank update of each weight, see `low_rank`; 0 to train the
            weights themselves.
        seed: seed of the order of the segments and of the initial low-rank updates.
        device: where both models are.
        journal: journal from which an interrupted training continues; None to start from the
            beginning and keep nothing.
        on_progress: called after every step.
        watch: called with the model after every step; it must not change the model.

    Raises:
        ModelError: a model does not load, or a value does not fit its dtype.
        ResourceError: both models do not fit into the GPU's memory.
    """
    names = [f"{one}.weight" for one in pruned.linears]

    def student_of(learner: Sharded) -> Student:
        if update_rank:
            return LowRank(learner, names, update_rank, seed)
        return KeptWeights(learner, names)

    learner, lesson = distil(
        pruned,
        dense,
        segments,
        student_of,
        count=count,
        seed=seed,
        device=device,
        journal=journal,
        on_progress=on_progress,
        watch=watch,
    )
    started = time.perf_counter()
    write(learner, pruned, destination)
    return replace(lesson, seconds=lesson.seconds + time.perf_counter() - started)


def distil(
    learning: Checkpoint,
    dense: Checkpoint,
    segments: Tensor,
    student_of: Callable[[Sharded], Student],
    *,
    count: int,
    seed: int,
    device: torch.device,
    journal: TrainingJournal | None,
    on_progress: OnProgress,
    watch: Watch = unwatched,
) -> tuple[Sharded, Recovery]:
    """Train a model towards the dense one; for the arguments that are not listed see `recover`.

    Args:
        learning: the model to train.
        student_of: makes the `Student` of the loaded model, in which only the weights of the
            blocks' linear layers have gradients.

    Returns:
        the trained model, and a report on the training.
    """
    started = time.perf_counter()
    before = 0.0 if journal is None else journal.reached.seconds
    model, teacher = (load_model(one.folder, device) for one in (learning, dense))
    require_plain_head(teacher)
    model.requires_grad_(False)
    for name in learning.linears:
        weight = model.get_parameter(f"{name}.weight").requires_grad_(True)
        # AdamW's fused step reads entries in the order of memory. So it would pair the entries of a
        # transposed view, as some experts' weights are, with the wrong gradients.
        weight.data = weight.data.contiguous()
    learner, _ = (
        Sharded(one, [one.get_submodule(block.prefix.rstrip(".")) for block in checkpoint.blocks])
        for one, checkpoint in ((model, learning), (teacher, dense))
    )
    steps = _order(len(segments), count, seed).split(max(1, _TOKENS_A_STEP // segments.shape[1]))
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    with memory_for("training the remaining weights, with the dense model as teacher"):
        divergence = _train(
            learner,
            student_of(learner),
            teacher,
            [segments[step] for step in steps],
            dtype,
            journal,
            told=on_progress,
            watch=watch,
        )
    return learner, Recovery(
        divergence=tuple(mean(part) for part in _tenths(divergence)),
        tokens=count * segments.shape[1],
        dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        seconds=before + time.perf_counter() - started,
    )


def _order(available: int, count: int, seed: int) -> Tensor:
    """Numbers of segments, int64[count]: all in one random order, then in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    return torch.cat(rounds)[:count]


def _train(
    learner: Sharded,
    student: Student,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    journal: TrainingJournal | None,
    *,
    told: OnProgress,
    watch: Watch,
) -> list[float]:
    """Train in place; return the mean divergence of each step, in nats per token."""
    model = learner.model
    optimiser = torch.optim.AdamW(
        [one.tensor for one in student.learned], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        student.rate,
        total_steps=len(batches),
        # The scheduler divides by the number of warm-up steps minus 1, so that must not be 1.
        pct_start=_WARM_UP if len(batches) * _WARM_UP != 1.0 else 1.5 * _WARM_UP,
        cycle_momentum=False,
    )
    heads = head_of(model), head_of(teacher)
    reached, began = Reached(), time.perf_counter()
    if journal is not None and journal.reached.step:
        reached = journal.reached
        _resume(journal, learner, student, optimiser)
        for _ in range(reached.step):
            optimiser.step()  # changes nothing without gradients; the schedule expects the call
            schedule.step()
    divergence: list[Tensor] = []  # of this rank's parts since `reached`; stays on the device
    told(reached.step, len(batches))
    for step, batch in enumerate(batches[reached.step :], reached.step):
        parts = even(len(batch), _PARTS)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for turn in learner.turns(len(parts)):
            # A rank without a part computes the last part, and its gradient is not added.
            ids = batch[parts[len(parts) - 1 if turn is None else turn]].to(model.device)
            with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                with torch.no_grad():
                    wanted = last_states(teacher, ids)
                found = _pull(last_states(model, ids), wanted, heads, batch.numel())
            if turn is not None:
                total += found
        divergence.append(total)
        student.set_gradients()
        optimiser.step()
        schedule.step()
        student.update_weights()
        learner.forget_gradients()
        told(step + 1, len(batches))
        watch(step + 1, model)
        if journal is not None and step + 1 < len(batches) and journal.is_due():
            now = time.perf_counter()
            reached = Reached(
                step + 1, (*reached.nats, *_together(divergence)), reached.seconds + now - began
            )
            began, divergence = now, []
            _keep(journal, reached, learner, student, optimiser)
    nats = [*reached.nats, *_together(divergence)]
    logger.debug("divergence from the dense model in nats per token, by step: %s", nats)
    return nats


def _together(divergence: list[Tensor]) -> list[float]:
    """Sum the divergence of each step over all ranks."""
    by_rank = current().gather(_Divergence(tuple(torch.stack(divergence).tolist())))
    return [math.fsum(parts) for parts in zip(*(one.nats for one in by_rank), strict=True)]


def _state(student: Student, optimiser: torch.optim.AdamW) -> dict[str, Part]:
    """The tensors from which the training can continue, by name."""
    parts = {f"made.{number}": part for number, part in enumerate(student.derived)}
    for number, part in enumerate(student.learned):
        parts[f"learned.{number}"] = part
        moments = optimiser.state[part.tensor]
        for name in _MOMENTS:
            parts[f"{name}.{number}"] = Part(moments[name], part.rows_of)
    return parts


def _keep(
    journal: TrainingJournal,
    reached: Reached,
    learner: Sharded,
    student: Student,
    optimiser: torch.optim.AdamW,
) -> None:
    """Write the state of the training to the journal."""
    parts = _state(student, optimiser)
    kinds = {name: (part.tensor.dtype, learner.shape(part)) for name, part in parts.items()}
    journal.keep(reached, kinds, lambda name: learner.gathered(parts[name]))


def _resume(
    journal: TrainingJournal, learner: Sharded, student: Student, optimiser: torch.optim.AdamW
) -> None:
    """Restore a student and its optimiser from the journal."""
    for part in student.learned:
        optimiser.state[part.tensor] = {
            # In the form that AdamW creates; the fused step needs it on the tensor's device.
            "step": torch.tensor(float(journal.reached.step), device=part.tensor.device),
            **{name: torch.zeros_like(part.tensor) for name in _MOMENTS},
        }
    with journal.tensors() as file:
        for name, part in _state(student, optimiser).items():
            whole = file.read(name).reshape(learner.shape(part))
            learner.fill(part, whole.to(part.tensor.device))
    student.resume()


@dataclass(frozen=True, slots=True)
class _Divergence:
    """One rank's part of the divergence from the dense model in each step, in nats per token."""

    nats: tuple[float, ...]


def _pull(learned: Tensor, wanted: Tensor, heads: tuple[Head, Head], tokens: int) -> Tensor:
    """Add the gradient of some tokens' part of the mean divergence; return that part.

    For p = softmax(logits), the gradient of KL(q || p) with respect to the logits is p - q. So only
    the head has a graph with tensors of the size of the vocabulary, for a few tokens at a time.

    Args:
        learned: [tokens, hidden], the input of the trained model's head, with its graph.
        wanted: [tokens, hidden], the input of the teacher's head.
        heads: the heads of the trained model and of the teacher.
        tokens: number of tokens that the mean is taken over, including these.

    Returns:
        the part of the mean divergence in nats, a float64 scalar on the device.
    """
    states = learned.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for own, other in zip(
        states.split(_TOKENS_AT_ONCE), wanted.split(_TOKENS_AT_ONCE), strict=True
    ):
        logits = heads[0](own)
        with torch.no_grad():
            log_p = logits.float().log_softmax(dim=-1)
            log_q = heads[1](other).float().log_softmax(dim=-1)
            q = log_q.exp()
            total += (q * (log_q - log_p)).sum()
            gradient = (log_p.exp_() - q) / tokens
        logits.backward(gradient.to(logits.dtype))
    learned.backward(states.grad)
    return total / tokens


def _tenths(values: Sequence[float]) -> list[Sequence[float]]:
    """Split values into ten parts of nearly equal length, or into fewer parts of one value each."""
    parts = min(10, len(values))
    bounds = [len(values) * number // parts for number in range(parts + 1)]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def write(learner: Sharded, trained: Checkpoint, destination: Path | None) -> None:
    """Write a trained model in the dtypes of its checkpoint; all ranks call this, one writes.

    Args:
        learner: the trained model.
        trained: the checkpoint that it was loaded from.
        destination: an empty folder; None for a rank that writes nothing.

    Raises:
        ModelError: a value does not fit its dtype.
    """
    if destination is not None:
        copy_companions(trained.folder, destination, None)
    with WeightsCopy(trained.weights, destination, None) as copy:
        for name in (f"{one}.weight" for one in trained.linears):
            learned, stored = learner.whole(learner.own(name), name), trained.stored_name(name)
            if copy.writes:
                copy.write(stored, rounded(learned, copy.dtype(stored), stored))
        for name in copy.missing:
            copy.write(name, trained.weights.read([name])[name])
