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
    """The ONNX graph of a model, dense or pruned, in a folder that is called like its stage.

    Args:
        bundle: where it goes, claimed for writing.
        model: what is exported.
        request: how it is exported.
        patterns: by full name, what linear layers are claimed to hold.
        origin: what the graph's metadata says of where it comes from.
        inputs: hashes of what the stage reads.
        title: what the model is called in progress lines.
        codes: the folder with the codes of a quantised model; None for one that is not.
        stage: the name of the stage.
        overwrite: redo what was made with other options.
        announce: told of the work.

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
    """The graph of the pruned model of a bundle; see `export`."""
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
    """Whether the graph holds its patterns, and whether it agreed with PyTorch when it was made."""
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
