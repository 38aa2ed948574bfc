"""compressed-tensors: the quantised checkpoint as transformers and vLLM load it."""

from pathlib import Path
from typing import TYPE_CHECKING

from exporters.options import NoOptions
from exporters.target import Size, Target, no_checks, write_stage
from thanos_deploy.bundle.layout import MODEL
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.errors import UsageError
from thanos_deploy.progress import Announce

if TYPE_CHECKING:
    from exporters.compressed_tensors import CompressedResult

_NAME = "compressed-tensors"


def _export(
    bundle: Bundle, request: NoOptions, *, overwrite: bool, announce: Announce
) -> StageRecord:
    from exporters import compressed_tensors
    from thanos_deploy.model.checkpoint import Checkpoint
    from thanos_deploy.pruning.quantise import Codes
    from thanos_deploy.pruning.result import codes_of

    folder = codes_of(bundle)
    if folder is None:
        raise UsageError(
            f"--target {_NAME}: the model was not quantised",
            fix="prune again with --quantize int4 or int8",
        )
    model, codes = Checkpoint.open(bundle.path / MODEL), Codes.open(folder)
    compressed_tensors.require_held(model, codes.grid)

    def write(folder: Path) -> "CompressedResult":
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
    packages=(),
    gpu=False,
    export=_export,
    verify=no_checks,
    size=Size("compressed-tensors checkpoint", (".safetensors",), beside="checkpoint"),
    missing=None,
)
