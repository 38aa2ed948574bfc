"""ORT-GenAI: the graph with its configuration and tokenizer, as one folder."""

from dataclasses import dataclass
from pathlib import Path

from exporters.options import ExportRequest, NoOptions, exported_with
from exporters.packages import Package
from exporters.target import Missing, Target, no_checks, stage_bytes, write_stage
from thanos_deploy.bundle.layout import MODEL, ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.progress import Announce

_NAME = "genai"


@dataclass(frozen=True, slots=True)
class GenaiResult:
    """Agreement of ORT-GenAI with ONNX Runtime.

    Attributes:
        dtype: dtype of the graph.
        logits_error: largest difference of the logits, relative to their range.
        limit: the largest logits_error that is accepted.
        tokens: number of tokens that were compared.
    """

    dtype: str
    logits_error: float
    limit: float
    tokens: int


def _export(
    bundle: Bundle, request: ExportRequest, *, overwrite: bool, announce: Announce
) -> Exported[GenaiResult]:
    from exporters import genai
    from exporters.onnx.stage import export_pruned

    export_pruned(bundle, request, overwrite=overwrite, announce=announce)

    def write(folder: Path) -> GenaiResult:
        return genai.export(
            bundle.path / ONNX,
            bundle.path / MODEL,
            folder,
            on_progress=announce("Write the folder for ORT-GenAI and try it out"),
        )

    return write_stage(
        bundle,
        _NAME,
        write,
        result=GenaiResult,
        inputs={"model": bundle.model_sha256, ONNX: bundle.graph_sha256},
        bytes_needed=lambda: stage_bytes(bundle, ONNX),
        options=NoOptions(),
        overwrite=overwrite,
    )


TARGET = Target(
    name=_NAME,
    summary="the graph as a folder that ORT-GenAI loads",
    writes=_NAME,
    options=ExportRequest,
    result=GenaiResult,
    dtypes=("fp32", "fp16", "int8", "int4"),
    defaults=exported_with,
    packages=(Package("onnxruntime_genai", extra="genai"),),
    gpu=False,
    export=_export,
    verify=no_checks,
    size=None,
    missing=Missing("ORT-GenAI"),
)
