"""The n:m weights stored as what is kept and where: a checkpoint that takes 9/16 of float16 at 2:4.

The layout is described in `thanos_deploy.packing`. MODEL on the command line may be such a folder.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from thanos_deploy import artifact
from thanos_deploy.checkpoint import Checkpoint, Weights, copy_companions
from thanos_deploy.errors import GateError, UsageError
from thanos_deploy.packing import Sizes, pack_folder, unpack_folder
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import OnProgress, silent


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    pattern: Pattern | None,
    on_progress: OnProgress = silent,
) -> artifact.Json:
    """Write the packed folder, and unpack it again to see that nothing changed.

    Args:
        checkpoint: the model.
        destination: an existing folder.
        pattern: what every linear layer holds.
        on_progress: told of every finished step.

    Returns:
        how many weights were packed, and the bytes before and after.

    Raises:
        UsageError: the pattern is no n:m, or does not hold everywhere.
        ModelError: a weight does not hold the pattern.
        GateError: what is unpacked differs from the checkpoint.
    """
    refuse(pattern)
    assert isinstance(pattern, SemiStructured)
    on_progress(0, 2)
    copy_companions(checkpoint.folder, destination, None)
    sizes = pack_folder(
        checkpoint.folder,
        destination,
        {checkpoint.stored_name(f"{name}.weight"): pattern for name in checkpoint.linears},
        transposed=checkpoint.family.transposed,
    )
    on_progress(1, 2)
    _require_same(checkpoint.weights, destination)
    on_progress(2, 2)
    return _result(sizes, pattern)


def refuse(pattern: Pattern | None) -> None:
    """Refuse a pattern that cannot be packed.

    Raises:
        UsageError: it is no n:m, or None: not held everywhere.
    """
    if not isinstance(pattern, SemiStructured):
        raise UsageError(
            "the target packed needs n:m in every layer; this is "
            f"{pattern or 'not held everywhere'}",
            fix="prune to a pattern such as 2:4, without --outlier-rows",
        )


def _require_same(original: Weights, packed: Path) -> None:
    # Beside the packed folder, because /tmp may be small.
    with TemporaryDirectory(dir=packed.parent) as scratch:
        unpack_folder(packed, Path(scratch))
        unpacked = Weights(Path(scratch))
        for name in original.shapes:
            (before,), (after,) = (
                weights.read([name]).values() for weights in (original, unpacked)
            )
            if before.dtype != after.dtype or not before.equal(after):
                raise GateError(
                    f"{packed}: {name} is not the same after packing and unpacking",
                    fix="report the model; this is a bug in thanos_deploy/packing.py",
                )


def _result(sizes: Sizes, pattern: Pattern) -> artifact.Json:
    return {
        **asdict(sizes),
        "packed": len(sizes.packed),
        "pattern": str(pattern),
        "ratio": round(sizes.bytes_after / sizes.bytes_before, 4),
    }
