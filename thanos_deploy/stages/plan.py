"""What pruning would do, and what it would take, without doing it."""

import math
import shutil
from pathlib import Path

from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.forecast.estimate import Estimate, estimate, estimate_cutting
from thanos_deploy.machine import devices
from thanos_deploy.measure.options import EvalRequest
from thanos_deploy.model import assignment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.locate import locate_configuration
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.prune import layers as pruning
from thanos_deploy.prune.recipe import PruneRequest
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.prune import assigned, check, plan_summary, plan_widths, survey_blocks
from thanos_deploy.stages.texts import calibration


def outline(model: str, *, revision: str | None, announce: Announce) -> Checkpoint:
    """The sizes of a model, from its configuration alone; only a GGUF file is converted first."""
    folder = locate_configuration(model, revision=revision)
    if folder is None:
        return Dense(model).checkpoint(announce)
    return Checkpoint.outline(folder)


def plan_prune(
    model: str,
    out: Path,
    request: PruneRequest,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> Json:
    """What `prune` would do, and whether it would be refused; writes nothing to `out`.

    For a model that is to be shrunk this includes the widths of every block and the loss that is
    predicted for them, from a walk through the dense model.
    """
    dense = Dense(model, revision=revision)
    check(dense.checkpoint(announce), request)
    return plan_pruning(dense, request, out, announce)


def plan_pruning(
    dense: Dense,
    request: PruneRequest,
    out: Path,
    announce: Announce,
    evaluation: EvalRequest | None = None,
) -> Json:
    """What would be pruned, and what that takes; with an evaluation the stages after it as well."""
    source = dense.checkpoint(announce)
    entries = {name: math.prod(shape) for name, shape in pruning.linear_shapes(source).items()}
    _, ids, _ = calibration(source, request)
    exported = 0 if evaluation is None else 4 * source.parameters
    what: Json
    if request.shrinks:
        losses = survey_blocks(source, ids, request, announce)
        widths = plan_widths(source, losses, request)
        found = estimate_cutting(source, ids, request, losses, widths)
        what = {"widths": encode(plan_summary(widths))}
    else:
        patterns = assigned(source, request)
        found = estimate(source, ids, request, patterns)
        what = {
            "patterns": assignment.counts(patterns.get(name) for name in entries),
            "layers_left_dense": [name for name in entries if name not in patterns],
            "linear_weights_removed": sum(
                int(entries[name] * its.sparsity) for name, its in patterns.items()
            ),
        }
    return {
        "model": encode(dense.source),
        "model_type": source.config.model_type,
        "parameters": source.parameters,
        "linear_layers": len(entries),
        "linear_weights": sum(entries.values()),
        "prune": request.to_json(),
        "device": devices.describe(request.resolved_device),
        "disk_bytes_needed": source.bytes_in(request.dtype) + exported,
        "disk_bytes_free": shutil.disk_usage(_existing(out)).free,
        **what,
        "estimate": _estimated(source, found, request, evaluation),
    }


def _estimated(
    source: Checkpoint, found: Estimate, request: PruneRequest, evaluation: EvalRequest | None
) -> Json:
    seconds = dict(found.seconds)
    if evaluation is not None:
        # The dense and the pruned model; the output head is as much work as its share of weights.
        blocks = source.config.num_hidden_layers
        weights = sum(math.prod(shape) for shape in pruning.linear_shapes(source).values())
        head = source.config.vocab_size * source.config.hidden_size * blocks / weights
        tokens = 2 * evaluation.segments * evaluation.seqlen
        seconds["eval"] = tokens * found.token_seconds * (blocks + head)
    return {
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "memory_bytes": found.memory_bytes,
        "basis": found.basis,
        "not_estimated": [
            *(["recover"] if request.recover else []),
            *([] if evaluation is None else ["onnx", "bench"]),
        ],
    }


def _existing(path: Path) -> Path:
    """The path itself or the nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
