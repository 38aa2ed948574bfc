"""ONNX: the graph that engines and the other targets with a graph start from."""

from collections.abc import Iterator

from exporters.options import ExportRequest, exported_with
from exporters.target import Missing, Size, Table, Target
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.check import Check
from thanos_deploy.progress import Announce


def _export(
    bundle: Bundle, request: ExportRequest, *, overwrite: bool, announce: Announce
) -> Exported[GraphResult]:
    from exporters.onnx import stage

    return stage.export_pruned(bundle, request, overwrite=overwrite, announce=announce)


def _verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    from exporters.onnx.stage import verify

    return verify(bundle, stage)


def _show(graph: GraphResult) -> Table:
    """Table of the differences between ONNX Runtime and PyTorch, case by case."""
    kind = f"{graph.graph} graph"
    if graph.neutral_because is not None:
        kind += f" ({graph.neutral_because})"
    return Table(
        f"{kind}: ONNX Runtime against PyTorch, limit {graph.parity_limit:g}",
        ("case", "batch", "past", "sequence", "logits", "KV cache"),
        tuple(
            (
                case.name,
                *(str(size) for size in (case.batch, case.past, case.sequence)),
                *(f"{error:.1e}" for error in (case.logits_error, case.cache_error)),
            )
            for case in graph.parity
        ),
    )


TARGET = Target(
    name=ONNX,
    summary="one graph for prefill and decode, compared with PyTorch",
    writes=ONNX,
    options=ExportRequest,
    result=GraphResult,
    dtypes=("fp32", "fp16", "int8", "int4"),
    defaults=exported_with,
    packages=(),
    gpu=False,
    export=_export,
    verify=_verify,
    size=Size("ONNX", (".onnx", ".data"), beside="graph"),
    missing=Missing("the ONNX graph and its agreement with PyTorch"),
    show=_show,
)
