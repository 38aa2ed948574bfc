"""The eval stages: quality of the pruned model compared with that of the dense model."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import overload

from transformers import PreTrainedModel

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import UsageError
from thanos_deploy.machine import devices
from thanos_deploy.measure import evaluation, harness
from thanos_deploy.measure.examine import Examination, examine, examine_dense
from thanos_deploy.measure.fidelity import Outputs
from thanos_deploy.measure.options import EvalRequest, TaskRequest
from thanos_deploy.measure.perplexity import Losses, losses_of, perplexity_of
from thanos_deploy.measure.quality import (
    EVAL,
    EVAL_DENSE,
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
from thanos_deploy.model.head import read_head
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.locate import LocatedModel
from thanos_deploy.progress import Announce, OnProgress, quietly
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.judge import Judge, judge_alone, judge_both, keep
from thanos_deploy.stages.texts import frame_for, open_text, require_other_text, segments_for


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
    """Measure the quality of the dense and the pruned model, unless the stage is finished.

    Args:
        bundle: a bundle whose stage prune is finished; for "onnx" its stage onnx too.
        dense: the model that the bundle was made from.
        request: a text to measure quality on, or tasks.
        runtime: one of `evaluation.RUNTIMES`. For "onnx" the dense model is exported with the
            options of the bundle's graph.
        overwrite: redo a stage that was made with other options.
        announce: told of each task.

    Raises:
        DeployError: see `thanos_deploy.api.bundle.Bundle.evaluate`.
    """
    if isinstance(request, TaskRequest):
        return judge_both(bundle, dense, _by_tasks(request, runtime), overwrite, announce)
    text = open_text(
        request.text, request.text_field, held_out=True, source=dense.checkpoint(announce)
    )
    judge = _by_text(text, request, runtime, announce)
    if runtime == "torch":
        judge = _beside_dense(judge, dense, text, request, announce)
    return judge_both(bundle, dense, judge, overwrite, announce)


def evaluate_alone(
    model: str | LocatedModel,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    revision: str | None = None,
    announce: Announce = quietly,
) -> TextQuality | TaskQuality:
    """Measure the quality of a single model, without a comparison.

    If `model` is the folder of a bundle, its pruned model is measured and nothing is written to the
    bundle, which keeps only comparisons with the dense model; see `evaluate`. For `revision` see
    `Dense`.
    """
    if isinstance(request, TaskRequest):
        return judge_alone(model, revision, _by_tasks(request, runtime), announce)
    text = open_text(request.text, request.text_field, held_out=True)
    return judge_alone(model, revision, _by_text(text, request, runtime, announce), announce)


def evaluate_served(
    model: str | LocatedModel,
    request: EvalRequest | TaskRequest,
    url: str,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> TextQuality:
    """Measure the perplexity of a model on a running vLLM server; nothing is kept.

    Args:
        model: the model that the server runs, or a bundle whose folder for vLLM or pruned model the
            server runs.
        request: which text to measure on.
        url: address of the server.
        revision: see `Dense`.
        announce: told of the measurement, whose steps are segments.

    Raises:
        UsageError: tasks are requested, the server runs another model, or it does not take segments
            of this length.
        DeployError: see `Served` and `evaluate_alone`.
    """
    if isinstance(request, TaskRequest):
        raise UsageError(
            "--tasks with --runtime vllm: a server can be measured only on a text",
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


def qualities(bundle: Bundle, subjects: Mapping[str, Bundle]) -> dict[str, dict[str, float]]:
    """Return the quality values of `gates.QUALITIES` by name and label, as far as they are known.

    Only evaluations with the options and on the text of the bundle's own evaluation count; without
    one, the result is empty.
    """
    found: dict[str, dict[str, float]] = {}
    if not bundle.has(EVAL):
        return found
    options, inputs = bundle.options(EVAL), bundle.inputs(EVAL)
    for label, subject in subjects.items():
        for stage in (EVAL, EVAL_DENSE):
            if not subject.has(stage) or subject.options(stage) != options:
                continue
            read = subject.inputs(stage)
            if (read.text, read.frame) == (inputs.text, inputs.frame):
                for name, value in subject.result(stage).named.items():
                    found.setdefault(name, {})[label] = value
    return found


def _by_text(
    text: Text, request: EvalRequest, runtime: str, announce: Announce
) -> Judge[EvalRequest, TextInputs, TextQuality]:
    """Return the judge that measures each model alone on a text; a graph only by its perplexity."""

    def inputs(
        model: Checkpoint,
        sha256: str | None,
        dense: TextQuality | None,
        graph: Mapping[str, str],
    ) -> TextInputs:
        frame = frame_for(model).ids
        return TextInputs(model=sha256, dense=dense, text=text.sha256, frame=frame, onnx=graph)

    def measure(bundle: Path, _: Path | None, model: Checkpoint, title: str) -> TextQuality:
        if runtime == "torch":
            examination = _examination(text, model, request)
            progress = announce(f"Quality of the {title}")
            with _memory(title, request):
                return examine(_loaded(model, request), examination, on_progress=progress)
        progress = announce(f"Perplexity of the {title}'s ONNX graph")
        losses = losses_of(evaluation.graph_reader(bundle))
        return _text_quality(losses, model, text, request, progress)

    return Judge(
        stage=TEXT_STAGES[runtime],
        file=layout.PERPLEXITY[runtime],
        options=request.recorded,
        runtime=runtime,
        require=lambda calibration: require_other_text(text, calibration),
        inputs=inputs,
        measure=measure,
    )


def _beside_dense(
    judge: Judge[EvalRequest, TextInputs, TextQuality],
    dense: Dense,
    text: Text,
    request: EvalRequest,
    announce: Announce,
) -> Judge[EvalRequest, TextInputs, TextQuality]:
    """Return a judge that also compares the pruned model with the dense model's stored outputs."""

    def measure_dense(_: Path, folder: Path | None, model: Checkpoint, title: str) -> TextQuality:
        assert folder is not None
        examination = _examination(text, model, request)
        progress = announce(f"Quality of the {title}")
        with _memory(title, request):
            quality, outputs = examine_dense(
                _loaded(model, request), examination, model.max_positions, on_progress=progress
            )
        outputs.write(folder / layout.OUTPUTS)
        return quality

    of_dense = replace(judge, stage=EVAL_DENSE, measure=measure_dense)

    def measure(_: Path, __: Path | None, model: Checkpoint, title: str) -> TextQuality:
        source = dense.checkpoint(announce)
        with dense.claim() as bundle:  # another process may have stored outputs on another text
            keep(bundle, source, of_dense, None, overwrite=True)
            outputs = Outputs.read(bundle.path / layout.OUTPUTS)
        examination = _examination(text, model, request)
        progress = announce(f"Quality of the {title}")
        with _memory(title, request):
            head = read_head(source, devices.choose(request.device))
            return examine(
                _loaded(model, request), examination, outputs, head, on_progress=progress
            )

    return replace(judge, measure=measure, of_dense=of_dense)


def _examination(text: Text, model: Checkpoint, request: EvalRequest) -> Examination:
    """Prepare the segments and the questions about a text for a model."""
    ids, _, frame = segments_for(model, text, request.segments, request.seqlen, seed=None)
    tokenizer = load_tokenizer(model.folder)
    return Examination.of(text, tokenizer, ids, frame, questions=request.questions)


def _loaded(model: Checkpoint, request: EvalRequest) -> PreTrainedModel:
    return load_model(model.folder, devices.choose(request.device))


def _memory(title: str, request: EvalRequest) -> AbstractContextManager[None]:
    """Name the model and the segment length in an out-of-memory error."""
    return devices.memory_for(f"{title}, {request.seqlen} tokens at once")


def _text_quality(
    losses: Losses, model: Checkpoint, text: Text, request: EvalRequest, on_progress: OnProgress
) -> TextQuality:
    """Measure only the perplexity, from the losses that any runtime computes for the segments."""
    ids, _, frame = segments_for(model, text, request.segments, request.seqlen, seed=None)
    found = perplexity_of(losses, ids, frame=len(frame), on_progress=on_progress)
    return TextQuality(text.origin, found.value, found.segments, found.length, frame)


def _by_tasks(request: TaskRequest, runtime: str) -> Judge[TaskRequest, TaskInputs, TaskQuality]:
    return Judge(
        stage=TASK_STAGES[runtime],
        file=layout.TASKS[runtime],
        options=request.recorded,
        runtime=runtime,
        require=lambda _: harness.require(request),
        inputs=lambda _, sha256, dense, graph: TaskInputs(
            model=sha256, dense=dense, tasks=request.files, onnx=graph
        ),
        # The harness shows its own progress bars.
        measure=lambda bundle, _, model, __: harness.score(bundle, model, request, runtime),
    )
