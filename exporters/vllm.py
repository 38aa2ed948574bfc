"""A folder that vLLM serves: 2:4 weights packed for this project's plugin, others as stored.

vLLM fuses the layers that read the same activation into one (queries, keys and values; gate and
up). If any layer of such a group is not 2:4, the whole group is stored dense. Experts are always
stored dense.

A model without 2:4 layers needs no plugin: its weight files are hard links to the files of `model/`
where the file system allows, so they take no extra room.
"""

from collections.abc import Mapping
from pathlib import Path

from exporters.packed import require_same
from exporters.targets.vllm import VllmResult
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import UsageError
from thanos_deploy.model import loaders, packed_folder, quantization
from thanos_deploy.model import widths as block_widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.tensorfile import INDEX
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import OnProgress, silent

_CONFIG = "config.json"
_TWO_FOUR = SemiStructured(2, 4)


def require_served(checkpoint: Checkpoint) -> None:
    """Refuse a model that vLLM would refuse.

    Raises:
        UsageError: vLLM does not take the sizes of the model; the message has vLLM's requirement
            and the file of its source that states it.
    """
    folder = checkpoint.folder
    if block_widths.declared(folder) is not None:
        raise UsageError(
            f"{folder}: the blocks differ in width, or have a number of heads that no "
            "config.json of this model type can describe, and vLLM reads only config.json",
            fix="prune again with --allocation uniform, and, for model types whose "
            "config.json has no head size, with --shrink ffn",
        )
    verdict = loaders.of(loads((folder / _CONFIG).read_bytes()), "vLLM")
    if not verdict.compatible:
        reasons = "; ".join(verdict.reasons) or "this version was not checked for this model type"
        raise UsageError(
            f"{folder}: {verdict.loader} does not support this model: {reasons}",
            fix="prune again to other numbers of heads and channels, or serve the model with "
            "`thanos-deploy serve`",
        )


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    patterns: Mapping[str, Pattern],
    on_progress: OnProgress = silent,
) -> VllmResult:
    """Write the folder, and unpack it again to see that nothing changed.

    Args:
        checkpoint: a model that `require_served` accepts.
        destination: an empty folder.
        patterns: the patterns of the linear layers, by full name.
        on_progress: called before and after each of the two steps.

    Raises:
        ModelError: a weight does not hold the claimed pattern.
        GateError: unpacking gives other weights.
    """
    on_progress(0, 2)
    found = {name for name, pattern in patterns.items() if pattern == _TWO_FOUR}
    packed = _whole_groups(checkpoint, found)
    copy_companions(checkpoint.folder, destination, None)
    if packed:
        before, after = _pack(checkpoint, destination, packed)
        on_progress(1, 2)
        require_same(checkpoint.weights, destination)
    else:
        before = after = _link(checkpoint, destination)
    on_progress(2, 2)
    return VllmResult(
        packed=len(packed),
        dense=len(checkpoint.linears) - len(packed),
        dense_beside=tuple(sorted(found - packed)),
        bytes_before=before,
        bytes_after=after,
        ratio=round(after / before, 4),
    )


def found_in(checkpoint: Checkpoint) -> dict[str, Pattern]:
    """Find the linear layers whose weights are 2:4, by full name; any tool may have pruned them.

    Raises:
        UsageError: no linear layer is 2:4.
    """
    found: dict[str, Pattern] = {
        name: _TWO_FOUR
        for name in checkpoint.linears
        if judge(checkpoint.linear(name) != 0, _TWO_FOUR).holds
    }
    if not found:
        raise UsageError(
            f"{checkpoint.folder}: no linear layer is 2:4, so there is nothing to pack",
            fix="serve the model as it is, or prune it first: `thanos-deploy prune`",
        )
    return found


def _whole_groups(checkpoint: Checkpoint, two_four: set[str]) -> set[str]:
    """The 2:4 layers that can be packed: no experts, and only whole groups that vLLM fuses."""
    return {
        name
        for block in checkpoint.blocks
        for group in block.groups
        if block.routed.isdisjoint(group)
        and two_four.issuperset(names := [block.prefix + layer for layer in group])
        for name in names
    }


def _pack(checkpoint: Checkpoint, destination: Path, layers: set[str]) -> tuple[int, int]:
    sizes = packed_folder.pack_folder(
        checkpoint.folder,
        destination,
        {checkpoint.stored_name(f"{name}.weight"): _TWO_FOUR for name in sorted(layers)},
        files=checkpoint.weights.tensors,
        transposed=checkpoint.family.transposed,
    )
    config = loads((destination / _CONFIG).read_bytes())
    config["quantization_config"] = quantization.entry(layers)
    files.write_json(destination / _CONFIG, config)
    return sizes.bytes_before, sizes.bytes_after


def _link(checkpoint: Checkpoint, destination: Path) -> int:
    """Link the weight files into the folder, and return their total bytes."""
    shards = sorted(set(checkpoint.weights.files.values()))
    for name in [*shards, *([INDEX] if (checkpoint.folder / INDEX).exists() else [])]:
        files.link(checkpoint.folder / name, destination / name)
    return sum((checkpoint.folder / name).stat().st_size for name in shards)
