"""The functions of the API. Commands that work on one bundle are methods of `Bundle`.

This file is longer than others because more than half of it is documentation.
"""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

from thanos_deploy.api import _requests
from thanos_deploy.api._checks import Positive, Range, public
from thanos_deploy.api.bundle import Bundle
from thanos_deploy.api.options import (
    ModelLike,
    PatternLike,
    Progress,
    PruneExportOptions,
    PruneOptions,
)
from thanos_deploy.api.results import Diagnosis
from thanos_deploy.pattern import SemiStructured, Structured

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from thanos_deploy.api.results import ExportResult
    from thanos_deploy.forecast.forecast import Forecast
    from thanos_deploy.measure.quality import TaskQuality, TextQuality
    from thanos_deploy.report.model import Report
    from thanos_deploy.stages.plan import DryRun


@public
def prune(
    model: ModelLike,
    *,
    pattern: PatternLike,
    out: str | PathLike[str],
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Bundle:
    """Prune a model and write the checkpoint to `out/model`; the command `prune`.

    Repeating the call continues an interrupted run and does not repeat finished work. In a program
    started by torchrun, all ranks prune together; only rank 0 writes the bundle and calls
    `progress`.

    Args:
        model: a hub id, a local Hugging Face folder, a packed folder, a `.gguf` file, or a pair
            (`transformers` model, tokenizer), neither of which is changed. Code that comes with a
            model is never run.
        pattern: "n:m", which keeps n of every m consecutive weights; "unstructured:FRACTION" or
            "structured:FRACTION", which remove this fraction; or a `SemiStructured`,
            `Unstructured` or `Structured` object.
        out: folder for the bundle.
        revision: branch, tag or commit of a hub model.
        overwrite: replace what an earlier run wrote to `out` with other options or from another
            model.
        progress: called with the title of the current task, its finished steps and its total
            steps; see `Progress`.
        options: see `PruneOptions`.

    Returns:
        the bundle in `out`.

    Raises:
        UsageError: the options contradict each other or the content of `out`.
        ModelError: the model is missing, unreadable or unsupported, or does not fit the pattern.
        CalibrationError: the calibration text is missing, unreadable or too short.
        HessianError: the calibration statistics are not finite, or no damping makes the Hessian
            positive definite.
        IntegrityError: a file of the finished stage was changed, and `overwrite` is false.
        PlatformError: a package, the device or the network is not available, or another process
            is writing to `out`.
        ResourceError: there is not enough memory or disk space.
    """
    from thanos_deploy.bundle import manifest
    from thanos_deploy.ranks.start import connected
    from thanos_deploy.stages.dense import Dense
    from thanos_deploy.stages.prune import follow, prune

    request = _requests.prune_request(pattern, options)
    told = _requests.announce(progress)
    with connected() as ranks:
        dense = Dense(_requests.model(model), revision=revision)
        if ranks.is_first:
            with manifest.claim(Path(out), dense.source, overwrite=overwrite) as bundle:
                prune(bundle, dense, request, overwrite=overwrite, announce=told)
        else:
            follow(dense, request)
    return Bundle(out)


@public
def dry_run_prune(
    model: ModelLike,
    *,
    pattern: PatternLike,
    out: str | PathLike[str],
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> "DryRun":
    """Plan a run of `prune`: what it would do, its time, memory and disk; `prune --dry-run`.

    Nothing is written to `out`. If the pattern is structured and `keep_shape` is false, the plan
    takes a pass through the dense model, which measures what each block would lose.

    Args:
        model, pattern, out, revision, progress, options: see `prune`.

    Returns:
        the plan.

    Raises:
        DeployError: the errors of `prune` that can be found without pruning.
    """
    from thanos_deploy.stages.plan import plan_prune

    return plan_prune(
        _requests.model(model),
        Path(out),
        _requests.prune_request(pattern, options),
        revision=revision,
        announce=_requests.announce(progress),
    )


@public
def prune_export(
    model: ModelLike,
    *,
    pattern: PatternLike,
    out: str | PathLike[str],
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PruneExportOptions],
) -> Bundle:
    """Prune a model, export it, measure it and write a report; the command `prune-export`.

    Args:
        model, pattern, out, revision, overwrite, progress: see `prune`.
        options: see `PruneExportOptions`.

    Returns:
        the bundle, with the report in its folder `report/`.

    Raises:
        DeployError: see `prune` and the methods of `Bundle`. Errors that can be found beforehand
            are raised before any work begins.
    """
    from thanos_deploy.stages import pipeline

    asked = _requests.Pipeline.of(pattern, options)
    pipeline.prune_export(
        _requests.model(model),
        Path(out),
        request=asked.prune,
        evaluation=asked.evaluation,
        benchmarking=asked.benchmarking,
        target=asked.target,
        asked=asked.asked,
        revision=revision,
        overwrite=overwrite,
        announce=_requests.announce(progress),
    )
    return Bundle(out)


@public
def dry_run_prune_export(
    model: ModelLike,
    *,
    pattern: PatternLike,
    out: str | PathLike[str],
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PruneExportOptions],
) -> "DryRun":
    """Plan a run of `prune_export`: its stages and their cost; `prune-export --dry-run`.

    Nothing is written to `out`.

    Args:
        model, pattern, out, revision, overwrite, progress, options: see `prune_export`.

    Returns:
        the plan.

    Raises:
        DeployError: the errors of `prune_export` that can be found without pruning.
    """
    from thanos_deploy.stages import pipeline

    asked = _requests.Pipeline.of(pattern, options)
    return pipeline.plan(
        _requests.model(model),
        Path(out),
        request=asked.prune,
        evaluation=asked.evaluation,
        benchmarking=asked.benchmarking,
        revision=revision,
        overwrite=overwrite,
        announce=_requests.announce(progress),
    )


@public
def export(
    model: ModelLike,
    target: str,
    *,
    to: str | PathLike[str],
    revision: str | None = None,
    progress: Progress | None = None,
) -> "ExportResult":
    """Export an already sparse model that is not in a bundle; the command `export` with `--to`.

    To export the model of a bundle, see `Bundle.export`.

    Args:
        model: see `prune`; also a compressed-tensors checkpoint in the format sparse-24-bitmask.
        target: "vllm", the only target that can be made without a bundle.
        to: the folder to write, which must not exist yet.
        revision: branch, tag or commit of a hub model.
        progress: see `Progress`.

    Returns:
        the target's own record of the export.

    Raises:
        UsageError: the target takes bundles only, the folder exists, no layer is 2:4, or the
            program that loads the folder would refuse the model.
        ModelError: the model is missing, unreadable or unsupported.
        ResourceError: there is not enough disk space.
    """
    from thanos_deploy.stages.export import convert

    result: ExportResult = convert(
        _requests.model(model),
        Path(to),
        target=target,
        revision=revision,
        announce=_requests.announce(progress),
    )
    return result


@public
def evaluate(
    model: ModelLike,
    *,
    runtime: Literal["torch", "onnx", "vllm"] = "torch",
    url: str | None = None,
    device: str = "auto",
    text: str | PathLike[str] = "builtin",
    text_field: str = "text",
    segments: int = 12,
    seqlen: int = 1024,
    questions: Annotated[int, Range(0)] = 100,
    tasks: Sequence[str] | None = None,
    task_folder: str | PathLike[str] | None = None,
    limit: Positive | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> "TextQuality | TaskQuality":
    """Measure the quality of a single model; the command `eval` without `--dense`.

    If `model` is the folder of a bundle, its pruned model is measured and nothing is written to
    the bundle. To compare with the dense model and keep the results, see `Bundle.evaluate`.

    Args:
        model: see `prune`; or the folder of a bundle.
        runtime: what runs the model: "torch", "onnx" for its exported graph, or "vllm" for a
            running vLLM server.
        url: address of the vLLM server, such as "http://127.0.0.1:8000"; required for "vllm", and
            for "vllm" only.
        device, text, text_field, segments, seqlen, questions, tasks, task_folder, limit, progress:
            see `Bundle.evaluate`.
        revision: branch, tag or commit of a hub model.

    Returns:
        the quality on a text, or, if `tasks` are given, the scores in these tasks.

    Raises:
        DeployError: see `Bundle.evaluate`.
    """
    from thanos_deploy.stages.evaluate import evaluate_alone, evaluate_served

    request = _requests.quality_request(
        runtime=runtime,
        device=device,
        text=text,
        text_field=text_field,
        segments=segments,
        seqlen=seqlen,
        questions=questions,
        tasks=tasks,
        task_folder=task_folder,
        limit=limit,
    )
    server = _requests.server(runtime, url)
    found, told = _requests.model(model), _requests.announce(progress)
    if server is None:
        return evaluate_alone(found, request, runtime=runtime, revision=revision, announce=told)
    return evaluate_served(found, request, server, revision=revision, announce=told)


@public
def compare(
    bundles: Sequence[str | PathLike[str] | Bundle],
    output: str | PathLike[str],
    *,
    allow_different_models: bool = False,
    overwrite: bool = False,
) -> "Report":
    """Write one page that compares several bundles; the command `report` with `--output`.

    Args:
        bundles: the bundles, or their folders; nothing is written to them.
        output: path of the page, FILE.html; FILE.md and FILE.json are written beside it.
        allow_different_models: compare bundles even if their base models or tokenizers differ.
        overwrite: replace these files if they exist.

    Returns:
        the content of FILE.json.

    Raises:
        UsageError: the bundles are of different models, or the files cannot be written.
        InputError: a bundle has no pruned model yet, or cannot be read.
        IntegrityError: a record was changed after it was written.
    """
    from thanos_deploy.report.write import compare

    return compare(
        [one.path if isinstance(one, Bundle) else Path(one) for one in bundles],
        Path(output),
        allow_different_models=allow_different_models,
        overwrite=overwrite,
    )


@public
def plan(
    model: ModelLike,
    *,
    gpu: str,
    pattern: Sequence[PatternLike] = (SemiStructured(2, 4), Structured(0.25)),
    batch: Sequence[Positive] = (1, 8),
    prompt: Positive = 512,
    new_tokens: Positive = 128,
    dtype: Literal["fp16", "bf16", "int8", "fp8"] = "bf16",
    measured: str | PathLike[str] | None = None,
    prune: bool = False,
    gpus: Positive = 1,
    nsamples: Positive = 128,
    seqlen: Positive = 2048,
    revision: str | None = None,
    progress: Progress | None = None,
) -> "Forecast":
    """Forecast the speed of a model on a GPU that need not be present; the command `plan`.

    Only the model's configuration is read, not its weights; a GGUF file is converted first.

    Args:
        model: see `prune`.
        gpu: name of a GPU, such as "H100".
        pattern: patterns to compare with the dense model.
        batch: batch sizes; one forecast for each.
        prompt: number of tokens in each prompt.
        new_tokens: number of tokens generated after each prompt.
        dtype: dtype of the blocks' linear layers.
        measured: path of a file with times of matrix products measured on that GPU, as `gpu-check`
            writes it. Default: the measurements published with this project, if they include that
            GPU.
        prune: also forecast the time and memory of pruning to 2:4 on that GPU, for the presets
            "fast" and "best".
        gpus: with `prune`: number of GPUs that prune together.
        nsamples: with `prune`: number of calibration segments.
        seqlen: with `prune`: number of tokens in each calibration segment.
        revision: branch, tag or commit of a hub model.
        progress: called while a GGUF file is converted; see `Progress`.

    Returns:
        the forecast.

    Raises:
        UsageError: the GPU is unknown or does not support the dtype, the model takes fewer tokens
            than were asked for, or `prune` is true and the published measurements have no layer
            that was pruned on that GPU.
        ModelError: the model is missing or unsupported.
        InputError: the measurements cannot be read.
    """
    from thanos_deploy.forecast import datasheets
    from thanos_deploy.forecast import pruning as pruning_forecast
    from thanos_deploy.forecast.forecast import Generation
    from thanos_deploy.forecast.forecast import plan as forecast
    from thanos_deploy.forecast.measurements import published_measurements, read_measurements
    from thanos_deploy.forecast.roofline import Setting
    from thanos_deploy.model.locate import LocatedModel
    from thanos_deploy.stages.plan import outline

    product = datasheets.find(gpu)
    known = (
        published_measurements(product, dtype)
        if measured is None
        else read_measurements(Path(measured).expanduser(), product, dtype)
    )
    found = _requests.model(model)
    sizes = outline(found, revision=revision, announce=_requests.announce(progress))
    outcome = forecast(
        sizes,
        [_requests.pattern(one) for one in pattern],
        Setting(product, dtype, known),
        Generation(tuple(batch), prompt, new_tokens),
        model=found.source.name if isinstance(found, LocatedModel) else found,
    )
    if prune:
        pruning = pruning_forecast.plan(sizes, product, gpus=gpus, nsamples=nsamples, seqlen=seqlen)
        outcome = replace(outcome, pruning=pruning)
    return outcome


@public
def doctor(out: "str | PathLike[str] | Bundle | None" = None, *, check: bool = True) -> Diagnosis:
    """Check whether this machine has what each target needs; the command `doctor`.

    Args:
        out: a bundle; if given, also check whether there is enough memory and disk space to build
            an engine from its graph.
        check: raise an error for the first failed check; False returns the result instead.

    Returns:
        one check for each component. A missing component is SKIP, with a way to install it.

    Raises:
        InputError: `out` is not a bundle, or has no ONNX graph yet.
        PlatformError: an installed component would fail, and `check` is true.
    """
    from exporters import preflight
    from thanos_deploy.bundle import manifest

    size = folder = None
    if out is not None:
        folder = out.path if isinstance(out, Bundle) else Path(out)
        graph = manifest.Bundle.open(folder).require("onnx", f"`thanos-deploy export {folder}`")
        size = sum(file.bytes for file in graph.files.values())
    found = Diagnosis(tuple(preflight.checks(graph_bytes=size, folder=folder)))
    return found.require() if check else found


@public
def load_model(
    folder: str | PathLike[str], device: "str | torch.device" = "cpu"
) -> "PreTrainedModel":
    """Load a model from a folder into memory, in float32 and in evaluation mode.

    `AutoModelForCausalLM.from_pretrained` loads every checkpoint of a bundle as well, except one
    whose blocks differ in width (`allocation="loss"`), which only this function loads.

    Args:
        folder: a Hugging Face checkpoint, such as `Bundle.model_path`.
        device: a PyTorch device.

    Returns:
        the model.

    Raises:
        ModelError: the model cannot be loaded.
        ResourceError: the model does not fit into the GPU's memory.
    """
    import torch

    from thanos_deploy.model.load import load_model

    return load_model(Path(folder), torch.device(device))
