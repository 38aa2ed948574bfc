"""The graph of a model as a stage of its bundle."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from exporters.onnx import graph as onnx
from exporters.options import GRAPHS, ExportRequest
from exporters.patterns import check, claimed
from exporters.target import write_stage
from thanos_deploy.bundle.codec import Json
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.layout import GRAPH, MODEL, ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.check import Check
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import Announce
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.result import PRUNE, codes_of


def export(
    bundle: Bundle,
    model: Checkpoint,
    request: ExportRequest,
    *,
    patterns: Mapping[str, Pattern],
    origin: Mapping[str, str],
    inputs: Json,
    title: str,
    codes: Path | None = None,
    stage: str = ONNX,
    overwrite: bool,
    announce: Announce,
) -> Exported[GraphResult]:
    """Export a model, dense or pruned, to ONNX as a stage of a bundle.

    Args:
        bundle: the bundle, claimed for writing.
        model: the model to export.
        request: options of the graph.
        patterns: claimed patterns of the linear layers, by full name.
        origin: entries for the graph's metadata that say where it comes from.
        inputs: hashes of the files that the stage reads.
        title: name of the model in progress lines.
        codes: the folder with the codes of a quantised model; None for a model without codes.
        stage: name of the stage and of its folder.
        overwrite: redo a stage that was made with other options.
        announce: called with the title of every task that starts.

    Raises:
        UsageError, ModelError, GateError: see `exporters.onnx.graph.export`.
    """

    def write(folder: Path) -> GraphResult:
        record = onnx.export(
            model,
            folder,
            pattern=patterns,
            dtype=request.dtype,
            max_sequence=request.max_sequence,
            logits=request.logits,
            graph=request.graph,
            codes=None if codes is None else Codes.open(codes),
            origin=origin,
            on_progress=announce(f"Export the {title} to ONNX and compare it with PyTorch"),
        )
        return GraphResult.of(record)

    return write_stage(
        bundle,
        stage,
        write,
        result=GraphResult,
        inputs=inputs,
        bytes_needed=lambda: 4 * model.parameters,
        options=request,
        overwrite=overwrite,
    )


def export_pruned(
    bundle: Bundle,
    request: ExportRequest,
    *,
    stage: str = ONNX,
    overwrite: bool,
    announce: Announce,
) -> Exported[GraphResult]:
    """Export the pruned model of a bundle; see `export`."""
    return export(
        bundle,
        Checkpoint.open(bundle.path / MODEL),
        request,
        patterns=claimed(bundle),
        origin={
            "method": bundle.options(PRUNE).method,
            "model_sha256": bundle.model_sha256,
        },
        inputs={"model": bundle.model_sha256},
        codes=codes_of(bundle),
        title="pruned model" if stage == ONNX else f"pruned model in {request.dtype}",
        stage=stage,
        overwrite=overwrite,
        announce=announce,
    )


def verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    """Check that the graph holds its patterns, and that it agreed with PyTorch at export."""
    yield check(bundle, stage, partial(onnx.judge_file, bundle.path / stage / GRAPH))
    result = bundle.result(replace(GRAPHS, name=stage))
    agrees = result.worst_logits_error <= result.parity_limit
    yield Check(
        f"{stage}: parity",
        "PASS" if agrees else "FAIL",
        f"ONNX Runtime against PyTorch: {result.worst_logits_error:.1e} of the logits' range at "
        f"export, limit {result.parity_limit:g}",
        fix="" if agrees else "export again",
    )
