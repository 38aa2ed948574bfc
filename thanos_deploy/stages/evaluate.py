"""The stages eval: quality of the pruned model, beside the dense one's."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from exporters.options import ExportRequest, exported_with
from runtime.graph import require_all_logits
from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.machine import devices
from thanos_deploy.measure import evaluation, harness
from thanos_deploy.measure import perplexity as quality
from thanos_deploy.measure.options import EvalRequest, TaskRequest
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export_dense
from thanos_deploy.stages.texts import frame_for, open_text, require_other_text, segments_for


def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Measure the quality of the dense and the pruned model, unless that is done.

    Args:
        bundle: with the stage prune finished; for "onnx" with the stage onnx too.
        dense: the model that it was made from.
        request: perplexity on a text, or tasks.
        runtime: one of `evaluation.RUNTIMES`. For "onnx" the dense model is exported like the
            bundle's own graph.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.
    """
    pruned = bundle.require("prune", "`thanos-deploy prune`")
    if runtime == "onnx":
        bundle.require("onnx", f"`thanos-deploy export {bundle.path} --target onnx`")
        require_all_logits(exported_with(bundle).logits)
    bundle.check(evaluation.stage(request, runtime), request.to_json(), overwrite=overwrite)
    _require_judge(request, pruned.inputs["text"])
    if runtime == "onnx":
        export_dense(dense, exported_with(bundle), announce)
    reference = _evaluate_dense(dense, request, runtime, announce)
    return _evaluate(
        *(bundle, Checkpoint.open(bundle.path / "model"), request, runtime),
        {"model": bundle.model_sha256, "dense": reference.result},
        announce,
        title="pruned model",
        overwrite=overwrite,
    )


def evaluate_alone(
    model: str,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    announce: Announce = quietly,
) -> Json:
    """Measure the quality of one model, or of a bundle's pruned one, beside nothing else.

    Of a bundle nothing is kept: what it keeps is beside the dense model; see `evaluate`.
    """
    folder = Path(model)
    if (folder / manifest.MANIFEST).exists():
        bundle = Bundle.open(folder)
        pruned = bundle.require("prune", "`thanos-deploy prune`")
        _require_judge(request, pruned.inputs["text"])
        checked = Checkpoint.open(folder / "model")
        return _measure(bundle, checked, request, runtime, announce, title="pruned model")
    _require_judge(request, None)
    alone = Dense(model)
    if runtime == "onnx":
        export_dense(alone, ExportRequest(), announce)
    return _evaluate_dense(alone, request, runtime, announce).result


def _evaluate_dense(
    dense: Dense, request: EvalRequest | TaskRequest, runtime: str, announce: Announce
) -> StageRecord:
    """Quality of the dense model; for "onnx" of its graph, which must be there."""
    checkpoint = dense.checkpoint(announce)
    with dense.claim() as bundle:
        return _evaluate(
            *(bundle, checkpoint, request, runtime, {}, announce),
            title="dense model",
            overwrite=True,
        )


def perplexities(bundle: Bundle, subjects: Mapping[str, Bundle]) -> dict[str, float]:
    """Perplexity by label, as far as it is known on the text that the bundle was judged on."""
    own = bundle.stages.get("eval")
    if own is None:
        return {}
    found = {
        label: subject.stages["eval"].result["value"]
        for label, subject in subjects.items()
        if "eval" in subject.stages
        and subject.stages["eval"].options == own.options
        and all(
            subject.stages["eval"].inputs.get(name) == own.inputs.get(name)
            for name in ("text", "frame")
        )
    }
    return found


def _require_judge(request: EvalRequest | TaskRequest, calibration_sha256: str | None) -> None:
    """Refuse what quality cannot be judged by, before anything takes time."""
    if isinstance(request, TaskRequest):
        harness.require(request)
    else:
        text = open_text(request.text, request.text_field, held_out=True)
        require_other_text(text, calibration_sha256)


def _evaluate(
    bundle: Bundle,
    model: Checkpoint,
    request: EvalRequest | TaskRequest,
    runtime: str,
    inputs: Json,
    announce: Announce,
    *,
    title: str,
    overwrite: bool,
) -> StageRecord:
    def produce(folder: Path) -> Json:
        result = _measure(bundle, model, request, runtime, announce, title=title)
        (folder / "eval").mkdir()
        files.write_json(folder / evaluation.file(request, runtime), {**result, **inputs})
        return result

    judge = (
        request.files
        if isinstance(request, TaskRequest)
        else open_text(request.text, request.text_field, held_out=True).sha256
    )
    return bundle.run(
        evaluation.stage(request, runtime),
        produce,
        options=request.to_json(),
        inputs={
            **inputs,
            "text" if isinstance(request, EvalRequest) else "tasks": judge,
            **(frame_for(model).inputs if isinstance(request, EvalRequest) else {}),
            **({"onnx": bundle.graph_sha256} if runtime == "onnx" else {}),
        },
        overwrite=overwrite,
    )


def _measure(
    bundle: Bundle,
    model: Checkpoint,
    request: EvalRequest | TaskRequest,
    runtime: str,
    announce: Announce,
    *,
    title: str,
) -> Json:
    """Perplexity or scores of a checkpoint, or of the graph in its bundle."""
    if isinstance(request, TaskRequest):
        # The library shows bars of its own.
        scores = harness.score(bundle.path, model, request, runtime)
        return {"scores": [asdict(score) for score in scores]}
    text = open_text(request.text, request.text_field, held_out=True)
    ids, frame = segments_for(model, text, request.segments, request.seqlen, seed=None)
    where = "" if runtime == "torch" else "'s ONNX graph"
    progress = announce(f"Perplexity of the {title}{where}")
    read = evaluation.open_reader(bundle.path, model, runtime, devices.choose(request.device))
    with devices.memory_for(f"{title}, {request.seqlen} tokens at once"):
        measured = quality.perplexity_of(read, ids, frame=len(frame), on_progress=progress)
    return {"text": text.origin, **asdict(measured), "frame": frame.to_json()}
