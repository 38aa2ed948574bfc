"""The export stages of a bundle. Each target defines the names and the files of its stages.

An export needs nothing but the bundle, so the folder can be copied to the machine with the GPU and
exported there.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from exporters import targets
from exporters.onnx import stage as graph
from exporters.options import ExportRequest
from thanos_deploy.bundle import files
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.errors import UsageError
from thanos_deploy.model.locate import LocatedModel
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.stages.dense import Dense


def export(
    bundle: Bundle,
    *,
    target: str = ONNX,
    request: object | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Exported[Any]:
    """Export the pruned model to a target, unless the stage is finished.

    Args:
        bundle: a bundle whose stage prune is finished, claimed for writing.
        target: one of `exporters.targets.names()`.
        request: the target's options, such as an `ExportRequest` or an `EngineRequest`; None for
            the target's defaults.
        overwrite: redo an export that was made with other options.
        announce: told of each task.

    Returns:
        the finished stage; the type of its result is `Target.result`.

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


def convert(
    model: str | LocatedModel,
    destination: Path,
    *,
    target: str,
    revision: str | None = None,
    announce: Announce = quietly,
) -> Any:
    """Write a target's folder from an already sparse model that is not in a bundle.

    Args:
        model: a model that was located already, or what `locate.locate` takes.
        destination: the folder to write, which must not exist yet.
        target: name of a target with a function `convert`.
        revision: branch, tag or commit of a hub model.
        announce: told of each task.

    Returns:
        the result that the stage of a bundle would have; its type is `Target.result`.

    Raises:
        UsageError: the target takes bundles only, or the folder exists.
        DeployError: see `Target.convert` and `locate.locate`.
    """
    write = targets.get(target).convert
    if write is None:
        able = [one.name for one in targets.every() if one.convert is not None]
        raise UsageError(
            f"--target {target}: this target can be made only from a bundle",
            fix=f"leave --to out, or use --target {' or '.join(able)}",
        )
    if destination.exists():
        raise UsageError(f"--to {destination}: the folder exists already", fix="name a new folder")
    checkpoint = Dense(model, revision=revision).checkpoint(announce)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=destination.parent, prefix=files.PARTIAL) as scratch:
        partial = Path(scratch) / destination.name
        partial.mkdir()
        files.require_disk(partial, 2 * checkpoint.bytes_in("auto"))
        result = write(checkpoint, partial, announce)
        partial.rename(destination)
    return result


def export_dense(dense: Dense, request: ExportRequest, announce: Announce) -> Exported[GraphResult]:
    """Export a dense model to ONNX, in its own bundle in the cache."""
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
