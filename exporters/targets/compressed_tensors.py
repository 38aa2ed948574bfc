"""compressed-tensors: the quantised checkpoint in a format that transformers and vLLM load."""

from dataclasses import dataclass
from pathlib import Path

from exporters.options import NoOptions
from exporters.target import Size, Target, no_checks, write_stage
from thanos_deploy.bundle.layout import MODEL
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.errors import UsageError
from thanos_deploy.progress import Announce

_NAME = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class CompressedResult:
    """Content of the written folder.

    Attributes:
        grid: the grid that the layers are quantised to.
        layers: number of quantised layers.
        bytes_before, bytes_after: total bytes of the safetensors files of the model and of the
            folder.
        ratio: bytes_after / bytes_before.
    """

    grid: str
    layers: int
    bytes_before: int
    bytes_after: int
    ratio: float


def _export(
    bundle: Bundle, request: NoOptions, *, overwrite: bool, announce: Announce
) -> Exported[CompressedResult]:
    from exporters import compressed_tensors
    from thanos_deploy.model.checkpoint import Checkpoint
    from thanos_deploy.pruning.codes import Codes
    from thanos_deploy.pruning.result import codes_of

    folder = codes_of(bundle)
    if folder is None:
        raise UsageError(
            f"--target {_NAME}: the model was not quantised",
            fix="prune again with --quantize int4 or int8",
        )
    model, codes = Checkpoint.open(bundle.path / MODEL), Codes.open(folder)
    compressed_tensors.require_held(model, codes.grid)

    def write(folder: Path) -> CompressedResult:
        return compressed_tensors.export(
            model,
            codes,
            folder,
            on_progress=announce("Write the quantised checkpoint"),
        )

    return write_stage(
        bundle,
        _NAME,
        write,
        result=CompressedResult,
        inputs={"model": bundle.model_sha256},
        bytes_needed=lambda: model.bytes_in("auto"),
        options=request,
        overwrite=overwrite,
    )


TARGET = Target(
    name=_NAME,
    summary="the quantised checkpoint as transformers and vLLM load it",
    writes=_NAME,
    options=NoOptions,
    result=CompressedResult,
    packages=(),
    gpu=False,
    export=_export,
    verify=no_checks,
    size=Size("compressed-tensors checkpoint", (".safetensors",), beside="checkpoint"),
    missing=None,
)
