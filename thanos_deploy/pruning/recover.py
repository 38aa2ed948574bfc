"""Train the remaining weights of a pruned model, with the dense model as the teacher.

At every position of the calibration text, the pruned model learns the dense model's distribution of
the next token (knowledge distillation: Hinton, Vinyals and Dean, arXiv 1503.02531); the token that
really comes next plays no part. Only the weights of the blocks' linear layers learn. One that is
zero stays zero, so every pattern survives.

This needs both models in memory, in float32, and for each weight that learns also its gradient and
the two moments of AdamW. Several ranks share the blocks of both (`ranks.sharded`). Products are
taken in bfloat16 where the device has instructions for matrices of it.

The sequences of a step are cut into parts, the same for every number of ranks, which compute them
side by side; the gradients of the parts are added up in their order, and each rank takes the step
for its share of the weights. What else can learn so is a `Student`: `low_rank` and `train_scales`
have one.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Protocol

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
from thanos_deploy.pruning.training_journal import Reached, TrainingJournal
from thanos_deploy.ranks.group import current
from thanos_deploy.ranks.sharded import Part, Sharded
from thanos_deploy.ranks.spread import even

logger = logging.getLogger(__name__)

# Shown the number of a step that is done, from 1 on, and the model as it is then.
Watch = Callable[[int, PreTrainedModel], None]


def unwatched(step: int, model: PreTrainedModel) -> None:
    """Nobody looks at the model before it is finished."""


# What measured best on held-out text; see benchmarks/LOG.md.
LEARNING_RATE = 4e-4
_TOKENS_A_STEP = 2048
_WARM_UP = 0.1  # of the steps

# Parts of a step, if it looks at so many sequences.
_PARTS = 4

# What AdamW keeps of each tensor, under its names.
_MOMENTS = ("exp_avg", "exp_avg_sq")

# Logits of so many tokens at once: a vocabulary of floats each. Beyond 32 MB glibc fetches every
# tensor from the system anew.
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
    """Train a pruned model towards the dense one, and write it in the dtypes that it has.

    Args:
        pruned: the model that learns.
        dense: the model that it was made from.
        segments: int64[available, length], calibration tokens.
        destination: an empty folder; None for a rank that writes nothing.
        count: of segments to learn from; where it is more than there are, they come again.
        update_rank: of the update of each weight, see `low_rank`; 0 for the weights themselves.
        seed: of the segments' order, and of what an update begins with.
        device: where both models are.
        journal: by which it goes on after it was ended; None to begin, and keep nothing.
        on_progress: told of every finished step.
        watch: shown the model after every step, which it must leave as it is.

    Raises:
        ModelError: a model does not load, or a value does not fit its dtype.
        ResourceError: both models do not fit into the GPU's memory.
    """
    names = [f"{one}.weight" for one in pruned.linears]
    learner, lesson = distil(
        pruned,
        dense,
        segments,
        lambda learner: (
            LowRank(learner, names, update_rank, seed) if update_rank else _Kept(learner, names)
        ),
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


class Student(Protocol):
    """What learns of a model whose weights are made of it."""

    @property
    def learned(self) -> Sequence[Part]:
        """What AdamW changes, in place; the same tensors every time."""
        ...

    @property
    def made(self) -> Sequence[Part]:
        """What was made of it step by step, and cannot be made of it again to the last bit."""
        ...

    @property
    def rate(self) -> float:
        """The largest one of AdamW."""
        ...

    def receive(self) -> None:
        """Give what is learned its gradient, from those of the model's weights."""
        ...

    def settle(self) -> None:
        """Have the model run with what has been learned."""
        ...

    def resume(self) -> None:
        """Go on from `learned` and `made`, which hold what they held after a step."""
        ...


class _Kept:
    """The weights that are not zero; each rank has rows of them, which the model runs with."""

    rate = LEARNING_RATE
    made: Sequence[Part] = ()

    def __init__(self, learner: Sharded, names: Sequence[str]) -> None:
        self._learner, self._names = learner, names
        self.learned = [Part(learner.own(name), name) for name in names]
        self._kept = [weight.tensor != 0 for weight in self.learned]

    def receive(self) -> None:
        """See `Student`."""
        gradients = [self._learner.gradient(name) for name in self._names]
        for weight, gradient, keep in zip(self.learned, gradients, self._kept, strict=True):
            # With a gradient of zero Adam's moments are zero too, and nothing moves.
            weight.tensor.grad = gradient.mul_(keep)
        _clip(self._learner, self._names, 1.0)

    def settle(self) -> None:
        """See `Student`."""

    def resume(self) -> None:
        """See `Student`."""


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
    """Let a model learn from the dense one; for the arguments that are not here see `recover`.

    Args:
        learning: the model that learns, in memory.
        student_of: what learns of it; only the weights of the blocks' linear layers have gradients.
    """
    started = time.perf_counter()
    before = 0.0 if journal is None else journal.reached.seconds
    model, teacher = (load_model(one.folder, device) for one in (learning, dense))
    require_plain_head(teacher)
    model.requires_grad_(False)
    for name in learning.linears:
        weight = model.get_parameter(f"{name}.weight").requires_grad_(True)
        # AdamW's fused step takes entries in the order of memory, and so would mix up those of a
        # view that is transposed, as some experts' weights are, with their gradients.
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
    """int64[count], numbers of segments: all of them in one random order, then in another, ..."""
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
    """Train in place; returns the mean divergence of each step, in nats per token."""
    model = learner.model
    optimiser = torch.optim.AdamW(
        [one.tensor for one in student.learned], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        student.rate,
        total_steps=len(batches),
        # It divides by the steps of warming up less one.
        pct_start=_WARM_UP if len(batches) * _WARM_UP != 1.0 else 1.5 * _WARM_UP,
        cycle_momentum=False,
    )
    heads = head_of(model), head_of(teacher)
    reached, began = Reached(), time.perf_counter()
    if journal is not None and journal.reached.step:
        reached = journal.reached
        _resume(journal, learner, student, optimiser)
        for _ in range(reached.step):
            optimiser.step()  # nothing has a gradient, so this only counts for the schedule
            schedule.step()
    divergence: list[Tensor] = []  # of this rank's parts since; the host reads it when it must
    told(reached.step, len(batches))
    for step, batch in enumerate(batches[reached.step :], reached.step):
        parts = even(len(batch), _PARTS)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for turn in learner.turns(len(parts)):
            # Whoever has no part computes one whose gradient is not added.
            ids = batch[parts[len(parts) - 1 if turn is None else turn]].to(model.device)
            with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                with torch.no_grad():
                    wanted = last_states(teacher, ids)
                found = _pull(last_states(model, ids), wanted, heads, batch.numel())
            if turn is not None:
                total += found
        divergence.append(total)
        student.receive()
        optimiser.step()
        schedule.step()
        student.settle()
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
    """All ranks' divergence in each step, of what each has of it."""
    by_rank = current().gather(_Divergence(tuple(torch.stack(divergence).tolist())))
    return [math.fsum(parts) for parts in zip(*(one.nats for one in by_rank), strict=True)]


def _state(student: Student, optimiser: torch.optim.AdamW) -> dict[str, Part]:
    """What training goes on from, by name."""
    parts = {f"made.{number}": part for number, part in enumerate(student.made)}
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
    """Write down how far the training has come."""
    parts = _state(student, optimiser)
    kinds = {name: (part.tensor.dtype, learner.shape(part)) for name, part in parts.items()}
    journal.keep(reached, kinds, lambda name: learner.gathered(parts[name]))


def _resume(
    journal: TrainingJournal, learner: Sharded, student: Student, optimiser: torch.optim.AdamW
) -> None:
    """Have a student and its optimiser be what they were."""
    for part in student.learned:
        optimiser.state[part.tensor] = {
            # As AdamW begins it; its fused step has it where the tensor is.
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


def _clip(learner: Sharded, names: Sequence[str], most: float) -> None:
    """Scale the gradients so that their norm, of all weights together, is at most so much."""
    rows = [
        learner.whole(learner.gradient(name).double().square().sum(dim=1), name) for name in names
    ]
    norm = torch.cat(rows).sum().sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0).float()
    for name in names:
        learner.gradient(name).mul_(scale)


def _pull(learned: Tensor, wanted: Tensor, heads: tuple[Head, Head], tokens: int) -> Tensor:
    """Add the gradient of a part of the mean divergence to the parameters; return that part.

    The gradient of KL(q || p) by the logits that p is the softmax of is p - q, so the vocabulary
    appears in no graph but that of the head, a few tokens at a time.

    Args:
        learned: [tokens, hidden], what the head of the model that learns reads, with its graph.
        wanted: [tokens, hidden], the same of its teacher.
        heads: of both.
        tokens: of which it is the mean, these among them.

    Returns:
        float64, a scalar on the device.
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
    """The values in ten parts of nearly equal length, or one each where they are fewer."""
    parts = min(10, len(values))
    bounds = [len(values) * number // parts for number in range(parts + 1)]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def write(learner: Sharded, trained: Checkpoint, destination: Path | None) -> None:
    """Write a model that has learned, in the dtypes that it has; all ranks, of which one writes.

    Args:
        learner: it.
        trained: what it was before.
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
