"""The stages eval: quality of the pruned model, beside the dense one's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, overload

from exporters.options import ExportRequest, exported_with
from runtime.graph import require_all_logits
from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Inputs, Options, Result, Stage
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import UsageError
from thanos_deploy.machine import devices
from thanos_deploy.measure import evaluation, harness
from thanos_deploy.measure.options import EvalRequest, TaskRequest
from thanos_deploy.measure.perplexity import Losses, losses_of, perplexity_of
from thanos_deploy.measure.quality import (
    EVAL,
    TASK_STAGES,
    TEXT_STAGES,
    Compared,
    TaskInputs,
    TaskQuality,
    TextInputs,
    TextQuality,
)
from thanos_deploy.measure.served import Served
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.locate import LocatedModel
from thanos_deploy.progress import Announce, OnProgress, quietly
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export_dense
from thanos_deploy.stages.texts import frame_for, open_text, require_other_text, segments_for


@dataclass(frozen=True, slots=True)
class _Judge(Generic[Options, Inputs, Result]):
    """A way to measure quality.

    Attributes:
        stage: that keeps what was measured.
        file: of that stage, in the bundle.
        options: what the stage is made with.
        runtime: one of `evaluation.RUNTIMES`.
        require: refuses what quality cannot be judged by, before anything takes time; from the
            hash of the text that the model was calibrated on, if there is one.
        inputs: what is read, from the model, its hash (None for a dense one), what was measured of
            the dense model, and the hashes of the graph that is run.
        measure: from the bundle, the model and its title in progress lines.
    """

    stage: Stage[Options, Inputs, Result]
    file: str
    options: Options
    runtime: str
    require: Callable[[str | None], None]
    inputs: Callable[[Checkpoint, str | None, Result | None, Mapping[str, str]], Inputs]
    measure: Callable[[Path, Checkpoint, str], Result]


@overload
def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Compared[TextQuality]: ...


@overload
def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: TaskRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Compared[TaskQuality]: ...


@overload
def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Compared[TextQuality] | Compared[TaskQuality]: ...


def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Compared[TextQuality] | Compared[TaskQuality]:
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
    if isinstance(request, TaskRequest):
        return _judge_both(bundle, dense, _by_tasks(request, runtime), overwrite, announce)
    judge = _by_text(request, runtime, announce, dense.checkpoint(announce))
    return _judge_both(bundle, dense, judge, overwrite, announce)


def evaluate_alone(
    model: str | LocatedModel,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    revision: str | None = None,
    announce: Announce = quietly,
) -> TextQuality | TaskQuality:
    """Measure the quality of one model, or of a bundle's pruned one, beside nothing else.

    Of a bundle nothing is kept: what it keeps is beside the dense model; see `evaluate`. For the
    revision see `Dense`.
    """
    if isinstance(request, TaskRequest):
        return _judge_alone(model, revision, _by_tasks(request, runtime), announce)
    return _judge_alone(model, revision, _by_text(request, runtime, announce), announce)


def evaluate_served(
    model: str | LocatedModel,
    request: EvalRequest | TaskRequest,
    url: str,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> TextQuality:
    """Measure what a server of vLLM makes of a model, beside nothing else; nothing is kept.

    Args:
        model: that is served, or a bundle of which it is the folder for vLLM or the model.
        request: which text.
        url: of the server.
        revision: see `Dense`.
        announce: told of every segment.

    Raises:
        UsageError: tasks are asked for, the server has another model, or it takes no segments of
            that length.
        DeployError: see `Served` and `evaluate_alone`.
    """
    if isinstance(request, TaskRequest):
        raise UsageError(
            "--tasks with --runtime vllm: a server is measured on a text",
            fix="run lm-evaluation-harness itself, with its model local-completions and the "
            "server's address",
        )
    served = Served.at(url)
    calibration = None
    if isinstance(model, str) and (Path(model) / layout.MANIFEST).exists():
        bundle = Bundle.open(Path(model))
        bundle.require(layout.PRUNE, "`thanos-deploy prune`")
        calibration = bundle.inputs(PRUNE).text
        checkpoint = Checkpoint.open(bundle.path / layout.MODEL)
        served.require(bundle.path / layout.VLLM, checkpoint.folder)
    else:
        checkpoint = Dense(model, revision=revision).checkpoint(announce)
        served.require(*([Path(model)] if isinstance(model, str) else []), checkpoint.folder)
    text = open_text(request.text, request.text_field, held_out=True)
    require_other_text(text, calibration)
    progress = announce(f"Perplexity of {served.model} at {served.url}")
    return _text_quality(lambda ids: [served.losses(ids)], checkpoint, text, request, progress)


def perplexities(bundle: Bundle, subjects: Mapping[str, Bundle]) -> dict[str, float]:
    """Perplexity by label, as far as it is known on the text that the bundle was judged on."""
    if not bundle.has(EVAL):
        return {}
    options, inputs = bundle.options(EVAL), bundle.inputs(EVAL)
    return {
        label: subject.result(EVAL).value
        for label, subject in subjects.items()
        if subject.has(EVAL) and subject.options(EVAL) == options
        if (read := subject.inputs(EVAL)).text == inputs.text and read.frame == inputs.frame
    }


def _by_text(
    request: EvalRequest, runtime: str, announce: Announce, source: Checkpoint | None = None
) -> _Judge[EvalRequest, TextInputs, TextQuality]:
    text = open_text(request.text, request.text_field, held_out=True, source=source)

    def inputs(
        model: Checkpoint,
        sha256: str | None,
        dense: TextQuality | None,
        graph: Mapping[str, str],
    ) -> TextInputs:
        frame = frame_for(model).ids
        return TextInputs(model=sha256, dense=dense, text=text.sha256, frame=frame, onnx=graph)

    def measure(bundle: Path, model: Checkpoint, title: str) -> TextQuality:
        where = "" if runtime == "torch" else "'s ONNX graph"
        progress = announce(f"Perplexity of the {title}{where}")
        read = evaluation.open_reader(bundle, model, runtime, devices.choose(request.device))
        with devices.memory_for(f"{title}, {request.seqlen} tokens at once"):
            return _text_quality(losses_of(read), model, text, request, progress)

    return _Judge(
        stage=TEXT_STAGES[runtime],
        file=layout.PERPLEXITY[runtime],
        options=request.recorded,
        runtime=runtime,
        require=lambda calibration: require_other_text(text, calibration),
        inputs=inputs,
        measure=measure,
    )


def _text_quality(
    losses: Losses, model: Checkpoint, text: Text, request: EvalRequest, on_progress: OnProgress
) -> TextQuality:
    """Perplexity of whatever runs a model, on segments that its tokenizer cuts."""
    ids, _, frame = segments_for(model, text, request.segments, request.seqlen, seed=None)
    found = perplexity_of(losses, ids, frame=len(frame), on_progress=on_progress)
    return TextQuality(text.origin, found.value, found.segments, found.length, frame)


def _by_tasks(request: TaskRequest, runtime: str) -> _Judge[TaskRequest, TaskInputs, TaskQuality]:
    return _Judge(
        stage=TASK_STAGES[runtime],
        file=layout.TASKS[runtime],
        options=request.recorded,
        runtime=runtime,
        require=lambda _: harness.require(request),
        inputs=lambda _, sha256, dense, graph: TaskInputs(
            model=sha256, dense=dense, tasks=request.files, onnx=graph
        ),
        # The library shows bars of its own.
        measure=lambda bundle, model, _: harness.score(bundle, model, request, runtime),
    )


def _judge_both(
    bundle: Bundle,
    dense: Dense,
    judge: _Judge[Options, Inputs, Result],
    overwrite: bool,
    announce: Announce,
) -> Compared[Result]:
    bundle.require(layout.PRUNE, "`thanos-deploy prune`")
    if judge.runtime == "onnx":
        bundle.require(layout.ONNX, f"`thanos-deploy export {bundle.path} --target onnx`")
        require_all_logits(exported_with(bundle).logits)
    bundle.check(judge.stage, judge.options, overwrite=overwrite)
    judge.require(bundle.inputs(PRUNE).text)
    reference = _judge_dense(
        dense, judge, exported_with(bundle) if judge.runtime == "onnx" else None, announce
    )
    model = Checkpoint.open(bundle.path / layout.MODEL)
    return Compared(reference, _keep(bundle, model, judge, reference, overwrite=overwrite))


def _judge_alone(
    model: str | LocatedModel,
    revision: str | None,
    judge: _Judge[Options, Inputs, Result],
    announce: Announce,
) -> Result:
    if isinstance(model, str) and (Path(model) / layout.MANIFEST).exists():
        folder = Path(model)
        bundle = Bundle.open(folder)
        bundle.require(layout.PRUNE, "`thanos-deploy prune`")
        judge.require(bundle.inputs(PRUNE).text)
        return judge.measure(folder, Checkpoint.open(folder / layout.MODEL), "pruned model")
    judge.require(None)
    graph = ExportRequest() if judge.runtime == "onnx" else None
    return _judge_dense(Dense(model, revision=revision), judge, graph, announce)


def _judge_dense(
    dense: Dense,
    judge: _Judge[Options, Inputs, Result],
    graph: ExportRequest | None,
    announce: Announce,
) -> Result:
    """Quality of the dense model, or of its graph, kept in its own bundle."""
    if graph is not None:
        export_dense(dense, graph, announce)
    checkpoint = dense.checkpoint(announce)
    with dense.claim() as bundle:
        return _keep(bundle, checkpoint, judge, None, overwrite=True)


def _keep(
    bundle: Bundle,
    model: Checkpoint,
    judge: _Judge[Options, Inputs, Result],
    reference: Result | None,
    *,
    overwrite: bool,
) -> Result:
    """Quality of a model, kept in its bundle beside that of the dense one, if there is one."""
    sha256 = None if reference is None else bundle.model_sha256
    beside: Json = {} if reference is None else {"model": sha256, "dense": encode(reference)}

    def produce(folder: Path) -> Result:
        title = "dense model" if reference is None else "pruned model"
        result = judge.measure(bundle.path, model, title)
        (folder / layout.EVAL).mkdir()
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
