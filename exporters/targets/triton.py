"""A model repository for Triton: the graph, the engines that Triton loads, and a text model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from exporters import targets
from exporters.options import ExportRequest, NoOptions, exported_with
from exporters.packages import Package
from exporters.target import Target, no_checks, stage_bytes, write_stage
from exporters.targets import tensorrt, tensorrt_rtx
from thanos_deploy.bundle.layout import GRAPH_RECORD, ONNX, engine_folder
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.progress import Announce

_NAME = "triton"


@dataclass(frozen=True, slots=True)
class TritonResult:
    """Content of the written model repository.

    Attributes:
        models: maps the name of a model to its Triton backend.
        left_out: maps the stage of an engine to the reason why it is not in the repository.
    """

    models: Mapping[str, str]
    left_out: Mapping[str, str]


def _export(
    bundle: Bundle, request: ExportRequest, *, overwrite: bool, announce: Announce
) -> Exported[TritonResult]:
    import runtime
    from exporters.onnx.stage import export_pruned
    from exporters.triton import repository
    from runtime.engines.onnxruntime import tensorrt_build_options
    from runtime.sampling import Sampling
    from thanos_deploy.bundle.graph_record import read_graph_record
    from thanos_deploy.pruning.result import PRUNE

    export_pruned(bundle, request, overwrite=overwrite, announce=announce)
    # The text model runs any graph with this project's runtime. The ONNX model runs on Triton's own
    # backend, so its graph must be neutral.
    graph = _neutral_graph(bundle, request, overwrite=overwrite, announce=announce)
    left_out = dict(_unfit(bundle))
    engines = {
        stage: repository.Engine(
            bundle.path / engine_folder(stage), bundle.path / bundle.source_of(stage)
        )
        for stage in _stages(bundle, tensorrt.TARGET)
        if stage not in left_out
    }

    def write(folder: Path) -> TritonResult:
        models = repository.export(
            bundle.path,
            folder,
            name=f"{bundle.source.name}-{bundle.options(PRUNE).pattern}",
            graph=graph,
            engines=engines,
            tensorrt_options=tensorrt_build_options(
                read_graph_record(bundle.path / graph / GRAPH_RECORD)
            ),
            text_options={option.name: type(option.default) for option in fields(Sampling)},
            text_model=Path(runtime.__path__[0]) / "triton_model.py",
            on_progress=announce("Write the model repository for Triton"),
        )
        return TritonResult(models, left_out)

    return write_stage(
        bundle,
        _NAME,
        write,
        result=TritonResult,
        inputs={
            "model": bundle.model_sha256,
            **{stage: bundle.hashes(stage) for stage in (ONNX, graph, *engines)},
        },
        # Twice the files, for file systems without hard links.
        bytes_needed=lambda: 2 * sum(stage_bytes(bundle, one) for one in (ONNX, graph, *engines)),
        options=NoOptions(),
        overwrite=overwrite,
    )


def _neutral_graph(
    bundle: Bundle, request: ExportRequest, *, overwrite: bool, announce: Announce
) -> str:
    """Return the stage with a neutral graph; export one if the bundle's graph is not neutral."""
    from exporters.onnx.stage import export_pruned
    from thanos_deploy.bundle.graph_record import read_graph_record

    if read_graph_record(bundle.path / ONNX / GRAPH_RECORD).graph == "neutral":
        return ONNX
    stage = f"{ONNX}-neutral"
    wanted = replace(request, graph="neutral")
    export_pruned(bundle, wanted, stage=stage, overwrite=overwrite, announce=announce)
    return stage


def _unfit(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Stages of the engines that cannot go into a repository, each with the reason."""
    for stage in _stages(bundle, tensorrt_rtx.TARGET):
        yield stage, "Triton has no backend for TensorRT-RTX"
    for stage in _stages(bundle, tensorrt.TARGET):
        if not bundle.source_is_current(stage):
            source = bundle.source_of(stage)
            yield stage, f"built from an earlier {source}/, not from the current one"


def _stages(bundle: Bundle, target: Target[Any, Any]) -> list[str]:
    return [stage for stage in bundle.stages if targets.of_stage(stage) is target]


TARGET = Target(
    name=_NAME,
    summary="the graph, the engines and a text model for Triton, and KServe",
    writes=_NAME,
    options=ExportRequest,
    result=TritonResult,
    dtypes=("fp32", "fp16", "int8", "int4"),
    defaults=exported_with,
    packages=(Package("tritonclient.grpc", extra="triton"),),
    gpu=False,
    export=_export,
    verify=no_checks,
    size=None,
    missing=None,
)
