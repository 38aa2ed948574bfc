"""A folder that `vllm serve` loads, with this project's plugin for 2:4 weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.options import NoOptions
from exporters.target import Missing, Size, Target, write_stage
from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.layout import MODEL, VLLM
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.check import Check
from thanos_deploy.errors import DeployError
from thanos_deploy.progress import Announce

if TYPE_CHECKING:
    from thanos_deploy.model.checkpoint import Checkpoint

_NAME = VLLM


@dataclass(frozen=True, slots=True)
class VllmResult:
    """Content of the written folder.

    Attributes:
        packed, dense: number of linear layers that are stored packed, and dense.
        dense_beside: layers that are 2:4 but stored dense: vLLM fuses them with layers that are not
            2:4, or they are experts.
        bytes_before, bytes_after: total bytes of the safetensors files of the model and of the
            folder.
        ratio: bytes_after / bytes_before.
    """

    packed: int
    dense: int
    dense_beside: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    ratio: float


def _export(
    bundle: Bundle, request: NoOptions, *, overwrite: bool, announce: Announce
) -> Exported[VllmResult]:
    from exporters import vllm
    from exporters.patterns import claimed
    from thanos_deploy.model.checkpoint import Checkpoint

    model = Checkpoint.open(bundle.path / MODEL)
    vllm.require_served(model)

    def write(folder: Path) -> VllmResult:
        return vllm.export(
            model,
            folder,
            patterns=claimed(bundle),
            on_progress=announce("Write the folder for vLLM and unpack it again to compare"),
        )

    return write_stage(
        bundle,
        _NAME,
        write,
        result=VllmResult,
        inputs={"model": bundle.model_sha256},
        bytes_needed=lambda: 2 * model.bytes_in("auto"),
        options=request,
        overwrite=overwrite,
    )


def _convert(checkpoint: "Checkpoint", folder: Path, announce: Announce) -> VllmResult:
    from exporters import vllm

    vllm.require_served(checkpoint)
    return vllm.export(
        checkpoint,
        folder,
        patterns=vllm.found_in(checkpoint),
        on_progress=announce("Write the folder for vLLM and unpack it again to compare"),
    )


def _verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    from thanos_deploy.model import quantization

    name = f"{stage}: packed layers"
    folder = bundle.path / stage
    config = loads((folder / "config.json").read_bytes())
    if "quantization_config" not in config:
        yield Check(name, "SKIP", "no layer is 2:4, so all are stored as they are")
        return
    try:
        layers = quantization.layers_of(config["quantization_config"])
        quantization.require_intact(folder, layers)
    except DeployError as error:
        yield Check(name, "FAIL", error.message, fix=error.fix)
    else:
        yield Check(name, "PASS", f"{len(layers)}, as config.json names them")


TARGET = Target(
    name=_NAME,
    summary="a folder that vLLM serves, with 2:4 weights packed for this project's plugin",
    writes=_NAME,
    options=NoOptions,
    result=VllmResult,
    packages=(),
    gpu=False,
    export=_export,
    verify=_verify,
    size=Size(
        "checkpoint for vLLM",
        (".safetensors",),
        beside="checkpoint",
        sentence="The checkpoint that vLLM serves takes {ratio:.3f} of the dense one's bytes.",
    ),
    missing=Missing("the size for vLLM"),
    convert=_convert,
)
