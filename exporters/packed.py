"""A checkpoint that stores only the kept n:m weights and a bit mask: 9/16 of float16 at 2:4.

The layout is described in `thanos_deploy.model.packing`. MODEL on the command line may be such a
folder.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from exporters.targets.packed import PackedResult, refuse
from thanos_deploy.errors import GateError, UsageError
from thanos_deploy.model.assignment import describe, every
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.packed_folder import pack_folder, unpack_folder
from thanos_deploy.model.tensorfile import TensorFile
from thanos_deploy.model.weights import Weights
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import OnProgress, silent


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    pattern: Pattern | Mapping[str, Pattern] | None,
    on_progress: OnProgress = silent,
) -> PackedResult:
    """Write the packed folder, and unpack it again to see that nothing changed.

    Args:
        checkpoint: the model.
        destination: an existing folder.
        pattern: the pattern of all linear layers, or of each by its full name; None for no pattern.
        on_progress: called after every finished step.

    Raises:
        UsageError: no layer holds n:m, or the files have the matrices of all experts in one tensor.
        ModelError: a weight does not hold the pattern.
        GateError: the unpacked folder differs from the checkpoint.
    """
    patterns = every(checkpoint.linears, pattern)
    refuse(patterns.values())
    if checkpoint.weights.parts:
        raise UsageError(
            f"{checkpoint.folder}: files of type {checkpoint.config.model_type} store the "
            "matrices of all experts in one tensor, which cannot be packed",
            fix="use --target onnx, or the folder of the model as it is",
        )
    on_progress(0, 2)
    copy_companions(checkpoint.folder, destination, None)
    sizes = pack_folder(
        checkpoint.folder,
        destination,
        {
            checkpoint.stored_name(f"{name}.weight"): its
            for name, its in patterns.items()
            if isinstance(its, SemiStructured)
        },
        files=checkpoint.weights.tensors,
        transposed=checkpoint.family.transposed,
    )
    on_progress(1, 2)
    require_same(checkpoint.weights, destination)
    on_progress(2, 2)
    return PackedResult(
        packed=len(sizes.packed),
        bytes_before=sizes.bytes_before,
        bytes_after=sizes.bytes_after,
        pattern=describe(patterns, len(checkpoint.linears)),
        ratio=round(sizes.bytes_after / sizes.bytes_before, 4),
    )


def require_same(original: Weights, packed: Path) -> None:
    """Unpack a packed folder to a temporary folder, and compare every tensor with the original.

    Raises:
        GateError: a tensor differs.
    """
    # Beside the packed folder, because /tmp may be small.
    with TemporaryDirectory(dir=packed.parent) as scratch:
        unpack_folder(packed, Path(scratch))
        unpacked = Weights(Path(scratch))
        for name, shard in original.tensors.items():
            with TensorFile.open(original.folder / shard) as file:
                before, after = file.read(name), unpacked.read([name])[name].flatten()
            if before.dtype != after.dtype or not before.equal(after):
                raise GateError(
                    f"{packed}: {name} is not the same after packing and unpacking",
                    fix="this is a bug in thanos_deploy/model/packing.py; report it with the "
                    "name of the model",
                )
