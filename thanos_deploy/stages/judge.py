"""How an eval stage judges models: the pruned model and the dense model, or a single model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from exporters.options import ExportRequest, exported_with
from runtime.graph import require_all_logits
from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Inputs, Options, Result, Stage
from thanos_deploy.measure.quality import Compared
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.locate import LocatedModel
from thanos_deploy.progress import Announce
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export_dense


@dataclass(frozen=True, slots=True)
class Judge(Generic[Options, Inputs, Result]):
    """A way to measure quality.

    Attributes:
        stage: the stage that keeps the results.
        file: path of the stage's file with the results, relative to the bundle.
        options: the options of the stage.
        runtime: one of `evaluation.RUNTIMES`.
        require: refuses a text or tasks that quality cannot be judged by, before any work. Called
            with the hash of the text that the model was calibrated on, or None.
        inputs: returns the inputs of the stage. Called with the model, its hash (None for a dense
            model), the result of the dense model (None for the dense model itself), and the hashes
            of the graph's files (empty if none is run).
        measure: measures a model. Called with the folder of the bundle, the folder for the stage's
            files (None if nothing is kept), the model, and its title for progress lines.
        of_dense: the judge of the dense model when a pruned model is compared with it; None for
            this judge.
    """

    stage: Stage[Options, Inputs, Result]
    file: str
    options: Options
    runtime: str
    require: Callable[[str | None], None]
    inputs: Callable[[Checkpoint, str | None, Result | None, Mapping[str, str]], Inputs]
    measure: Callable[[Path, Path | None, Checkpoint, str], Result]
    of_dense: "Judge[Options, Inputs, Result] | None" = None


def judge_both(
    bundle: Bundle,
    dense: Dense,
    judge: Judge[Options, Inputs, Result],
    overwrite: bool,
    announce: Announce,
) -> Compared[Result]:
    """Judge the pruned and the dense model; each result is kept in the model's own bundle."""
    bundle.require(layout.PRUNE, "`thanos-deploy prune`")
    if judge.runtime == "onnx":
        bundle.require(layout.ONNX, f"`thanos-deploy export {bundle.path} --target onnx`")
        require_all_logits(exported_with(bundle).logits)
    bundle.check(judge.stage, judge.options, overwrite=overwrite)
    judge.require(bundle.inputs(PRUNE).text)
    graph = exported_with(bundle) if judge.runtime == "onnx" else None
    reference = judge_dense(dense, judge.of_dense or judge, graph, announce)
    model = Checkpoint.open(bundle.path / layout.MODEL)
    return Compared(reference, keep(bundle, model, judge, reference, overwrite=overwrite))


def judge_alone(
    model: str | LocatedModel,
    revision: str | None,
    judge: Judge[Options, Inputs, Result],
    announce: Announce,
) -> Result:
    """Judge a single model.

    If it is the folder of a bundle, judge the pruned model and keep nothing. The result of a dense
    model is kept in its own bundle in the cache.
    """
    if isinstance(model, str) and (Path(model) / layout.MANIFEST).exists():
        folder = Path(model)
        bundle = Bundle.open(folder)
        bundle.require(layout.PRUNE, "`thanos-deploy prune`")
        judge.require(bundle.inputs(PRUNE).text)
        return judge.measure(folder, None, Checkpoint.open(folder / layout.MODEL), "pruned model")
    judge.require(None)
    graph = ExportRequest() if judge.runtime == "onnx" else None
    return judge_dense(Dense(model, revision=revision), judge, graph, announce)


def judge_dense(
    dense: Dense,
    judge: Judge[Options, Inputs, Result],
    graph: ExportRequest | None,
    announce: Announce,
) -> Result:
    """Judge the dense model, or its graph if `graph` is given; keep the result in its bundle."""
    if graph is not None:
        export_dense(dense, graph, announce)
    checkpoint = dense.checkpoint(announce)
    with dense.claim() as bundle:
        return keep(bundle, checkpoint, judge, None, overwrite=True)


def keep(
    bundle: Bundle,
    model: Checkpoint,
    judge: Judge[Options, Inputs, Result],
    reference: Result | None,
    *,
    overwrite: bool,
) -> Result:
    """Judge a model and keep the result in a bundle, unless the stage is finished.

    The file of a pruned model also contains `reference`, the result of the dense model, which is
    None for a dense model.
    """
    sha256 = None if reference is None else bundle.model_sha256
    beside: Json = {} if reference is None else {"model": sha256, "dense": encode(reference)}

    def produce(folder: Path) -> Result:
        title = "dense model" if reference is None else "pruned model"
        (folder / layout.EVAL).mkdir()
        result = judge.measure(bundle.path, folder, model, title)
        files.write_json(folder / judge.file, {**encode(result), **beside})
        return result

    graph = bundle.graph_sha256 if judge.runtime == "onnx" else {}
    bundle.run(
        judge.stage,
        produce,
        options=judge.options,
        inputs=judge.inputs(model, sha256, reference, graph),
        overwrite=overwrite,
    )
    return bundle.result(judge.stage)
