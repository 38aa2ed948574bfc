"""Train the remaining weights of a pruned model, with the dense model as the teacher.

At every position of the calibration text, the pruned model learns the dense model's distribution of
the next token (knowledge distillation: Hinton, Vinyals and Dean, arXiv 1503.02531); the token that
really comes next plays no part. Only the weights of the blocks' linear layers learn. One that is
zero stays zero, so every pattern survives.

This needs both whole models in memory, in float32, and for each weight that learns also its
gradient and the two moments of AdamW. Products are taken in
bfloat16 where the device has instructions for matrices of it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_deploy.machine.devices import CPU, memory_for
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.load import load_model
from thanos_deploy.model.rounding import rounded
from thanos_deploy.model.weights import WeightsCopy
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.result import Recovery

logger = logging.getLogger(__name__)

Head = Callable[[Tensor], Tensor]

# What measured best on held-out text; see benchmarks/LOG.md.
LEARNING_RATE = 4e-4
_TOKENS_A_STEP = 2048
_WARM_UP = 0.1  # of the steps

# Logits of so many tokens at once: a vocabulary of floats each. Beyond 32 MB glibc fetches every
# tensor from the system anew.
_TOKENS_AT_ONCE = 128


def recover(
    pruned: Checkpoint,
    dense: Checkpoint,
    segments: Tensor,
    destination: Path,
    *,
    count: int,
    seed: int = 0,
    device: torch.device = CPU,
    on_progress: OnProgress = silent,
) -> Recovery:
    """Train a pruned model towards the dense one, and write it in the dtypes that it has.

    Args:
        pruned: the model that learns.
        dense: the model that it was made from.
        segments: int64[available, length], calibration tokens.
        destination: an empty folder.
        count: of segments to learn from; where it is more than there are, they come again.
        seed: of their order.
        device: where both models are.
        on_progress: told of every finished step.

    Raises:
        ModelError: a model does not load, or a value does not fit its dtype.
        ResourceError: both models do not fit into the GPU's memory.
    """
    started = time.perf_counter()
    model, teacher = (load_model(one.folder, device) for one in (pruned, dense))
    learning = {
        name: model.get_parameter(name) for name in (f"{one}.weight" for one in pruned.linears)
    }
    steps = _order(len(segments), count, seed).split(max(1, _TOKENS_A_STEP // segments.shape[1]))
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    with memory_for("training what is left, with its teacher"):
        divergence = _train(
            model, learning, teacher, [segments[step] for step in steps], dtype, told=on_progress
        )
    copy_companions(pruned.folder, destination, None)
    with WeightsCopy(pruned.weights, destination, None) as copy:
        _write(learning, pruned, copy)
    return Recovery(
        divergence=tuple(mean(part) for part in _tenths(divergence)),
        tokens=count * segments.shape[1],
        dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        seconds=time.perf_counter() - started,
    )


def _order(available: int, count: int, seed: int) -> Tensor:
    """int64[count], numbers of segments: all of them in one random order, then in another, ..."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    return torch.cat(rounds)[:count]


def _train(
    model: PreTrainedModel,
    learning: Mapping[str, nn.Parameter],
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    told: OnProgress,
) -> list[float]:
    """Train in place; returns the mean divergence of each step, in nats per token."""
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
        kept = parameter.detach() != 0
        if not bool(kept.all()):
            # With a gradient of zero Adam's moments are zero too, and nothing moves.
            parameter.register_hook(kept.mul)
    optimiser = torch.optim.AdamW(
        learning.values(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        LEARNING_RATE,
        total_steps=len(batches),
        pct_start=_WARM_UP,
        cycle_momentum=False,
    )
    heads = _head(model), _head(teacher)
    divergence = []
    told(0, len(batches))
    for step, batch in enumerate(batches):
        ids = batch.to(model.device)
        optimiser.zero_grad()
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                wanted = _states(teacher, ids)
            divergence.append(_pull(_states(model, ids), wanted, heads))
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimiser.step()
        schedule.step()
        logger.debug("step %d: %.4f nats per token from the dense model", step, divergence[-1])
        told(step + 1, len(batches))
    return divergence


def _pull(learned: Tensor, wanted: Tensor, heads: tuple[Head, Head]) -> float:
    """Add the gradient of the mean divergence to the parameters; return that divergence.

    The gradient of KL(q || p) by the logits that p is the softmax of is p - q, so the vocabulary
    appears in no graph but that of the head, a few tokens at a time.

    Args:
        learned: [tokens, hidden], what the head of the model that learns reads, with its graph.
        wanted: [tokens, hidden], the same of its teacher.
        heads: of both.
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
            gradient = (log_p.exp_() - q) / len(states)
        logits.backward(gradient.to(logits.dtype))
    learned.backward(states.grad)
    return total.item() / len(states)


def _tenths(values: Sequence[float]) -> list[Sequence[float]]:
    """The values in ten parts of nearly equal length, or one each where they are fewer."""
    parts = min(10, len(values))
    bounds = [len(values) * number // parts for number in range(parts + 1)]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[tokens, hidden], what the output head reads; `ids` is int64[segments, length]."""
    states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def _head(model: PreTrainedModel) -> Head:
    """From states[tokens, hidden] to logits[tokens, vocabulary]."""
    linear = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)  # of Gemma
    return lambda states: linear(states) if cap is None else cap * (linear(states) / cap).tanh()


def _write(learning: Mapping[str, nn.Parameter], pruned: Checkpoint, copy: WeightsCopy) -> None:
    learned = {pruned.stored_name(name): parameter for name, parameter in learning.items()}
    for name in copy.missing:
        if name in learned:
            copy.write(name, rounded(learned[name].detach(), copy.dtype(name), name))
        else:
            copy.write(name, pruned.weights.read([name])[name])
