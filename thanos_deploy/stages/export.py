"""The export stages of a bundle; what they are called and what they write, each target says.

An export needs nothing but the bundle: the folder can be copied to the machine with the GPU and
finished there.
"""

from exporters import targets
from exporters.onnx import stage as graph
from exporters.options import ExportRequest
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.stages.dense import Dense


def export(
    bundle: Bundle,
    *,
    target: str = ONNX,
    request: object | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Export the pruned model to a target, unless that is done.

    Args:
        bundle: with the stage prune finished, claimed for writing.
        target: one of `exporters.targets.names()`.
        request: the target's options, such as an `ExportRequest` or an `EngineRequest`; None for
            the target's defaults.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.

    Raises:
        UsageError: there is no such target, or it does not take the request.
        DeployError: see `exporters.target.Export`.
    """
    chosen = targets.get(target)
    bundle.require("prune", "`thanos-deploy prune`")
    if request is None:
        request = chosen.request(bundle, {})
    chosen.check(request)
    return chosen.export(bundle, request, overwrite=overwrite, announce=announce)


def export_dense(dense: Dense, request: ExportRequest, announce: Announce) -> StageRecord:
    """ONNX of a dense model, in its own bundle."""
    checkpoint = dense.checkpoint(announce)
    with dense.claim() as bundle:
        return graph.export(
            bundle,
            checkpoint,
            request,
            patterns={},
            origin={"method": "none", "model_sha256": dense.source.sha256},
            inputs={},
            title="dense model",
            overwrite=True,
            announce=announce,
        )
