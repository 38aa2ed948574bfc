"""The checkpoint with its n:m weights stored without their zeros."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exporters.options import NoOptions
from exporters.target import Missing, Size, Target, no_checks, write_stage
from thanos_deploy.bundle.layout import MODEL
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.errors import UsageError
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.progress import Announce

_NAME = "packed"


@dataclass(frozen=True, slots=True)
class PackedResult:
    """Content of the packed checkpoint.

    Attributes:
        packed: number of weights that were packed.
        bytes_before, bytes_after: total bytes of the safetensors files before and after packing.
        pattern: description of the patterns of the linear layers; None for no pattern.
        ratio: bytes_after / bytes_before.
    """

    packed: int
    bytes_before: int
    bytes_after: int
    pattern: str | None
    ratio: float


def refuse(patterns: Iterable[Pattern]) -> None:
    """Refuse a model in which no layer can be packed.

    Args:
        patterns: the patterns of its linear layers.

    Raises:
        UsageError: no pattern is n:m.
    """
    found = list(patterns)
    if not any(isinstance(pattern, SemiStructured) for pattern in found):
        held = ", ".join(dict.fromkeys(map(str, found))) or "one that does not hold everywhere"
        raise UsageError(
            f"the target packed needs an n:m pattern, and the pattern of this model is {held}",
            fix="prune to a pattern such as 2:4, without --outlier-rows",
        )


def _export(
    bundle: Bundle, request: NoOptions, *, overwrite: bool, announce: Announce
) -> Exported[PackedResult]:
    from exporters import packed
    from exporters.patterns import claimed
    from thanos_deploy.model.checkpoint import Checkpoint

    patterns = claimed(bundle)
    refuse(patterns.values())
    model = Checkpoint.open(bundle.path / MODEL)

    def write(folder: Path) -> PackedResult:
        return packed.export(
            model,
            folder,
            pattern=patterns,
            on_progress=announce("Pack the checkpoint and unpack it again to compare"),
        )

    return write_stage(
        bundle,
        _NAME,
        write,
        result=PackedResult,
        inputs={"model": bundle.model_sha256},
        bytes_needed=lambda: 2 * model.bytes_in("auto"),
        options=request,
        overwrite=overwrite,
    )


TARGET = Target(
    name=_NAME,
    summary="the checkpoint with n:m weights stored without their zeros",
    writes=_NAME,
    options=NoOptions,
    result=PackedResult,
    packages=(),
    gpu=False,
    export=_export,
    verify=no_checks,
    size=Size(
        "packed checkpoint",
        (".safetensors",),
        beside="checkpoint",
        sentence="Packed, without its zeros, the checkpoint takes {ratio:.3f} of the dense one's "
        "bytes.",
    ),
    missing=Missing("the packed size"),
    refuse=refuse,
)
