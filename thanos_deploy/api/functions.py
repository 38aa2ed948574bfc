"""The functions of the API: commands that begin with a model, or with several bundles.

More than half of the file is the documentation of these functions, so it is longer than others.
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
    """Prune a model into `out/model`, an ordinary checkpoint; the command `prune`.

    Repeating the call continues where it was interrupted, and does no work twice. In a program that
    torchrun has started, all processes prune together; only the first one writes and calls
    `progress`.

    Args:
        model: a hub id, a local Hugging Face folder, a packed folder, a `.gguf` file, or the pair
            of a `transformers` model and its tokenizer, which are not changed. No code that comes
            with a model is run.
        pattern: "n:m", which keeps n of every m weights, "unstructured:FRACTION",
            "structured:FRACTION", or a `Pattern`.
        out: folder for the bundle.
        revision: branch, tag or commit of a hub model.
        overwrite: repeat stages that were made with other options.
        progress: called with the title of a piece of work, the steps done and the steps in all.
        options: see `PruneOptions`.

    Returns:
        the bundle.

    Raises:
        UsageError: the options contradict each other, or contradict what is in `out` already.
        ModelError: the model is missing, not readable, not supported, or does not fit the pattern.
        CalibrationError: the text is missing, not readable or too short.
        HessianError: the calibration statistics are not finite, or no damping makes them positive
            definite.
        PlatformError: a package, the device or the network is not available, or another process
            writes to `out`.
        ResourceError: memory or the disk is full.
    """
    from thanos_deploy.bundle import manifest
    from thanos_deploy.ranks.start import together
    from thanos_deploy.stages.dense import Dense
    from thanos_deploy.stages.prune import follow, prune

    request = _requests.prune_request(pattern, options)
    told = _requests.announce(progress)
    with together() as ranks:
        dense = Dense(_requests.model(model), revision=revision)
        if ranks.first:
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
    """Say what `prune` would do, and the time, memory and disk it takes; `prune --dry-run`.

    With a structured pattern this measures what each block would lose. Nothing is written to `out`.

    Args:
        model, pattern, out, revision, progress, options: see `prune`.

    Raises:
        DeployError: what `prune` would refuse.
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
        the bundle, with `report/` in it.

    Raises:
        DeployError: what `prune` and the methods of `Bundle` raise. Whatever can be refused before
            the work begins, is refused then.
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
    """Say what `prune_export` would do, and what that takes; `prune-export --dry-run`.

    Args:
        model, pattern, out, revision, overwrite, progress, options: see `prune_export`.

    Raises:
        DeployError: what `prune_export` would refuse.
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
    progress: Progress | None = None,
) -> "ExportResult":
    """Export a model without a bundle that is already sparse; the command `export` with `--to`.

    To export a model from its bundle, see `Bundle.export`.

    Args:
        model: see `prune`; also a checkpoint of compressed-tensors in the format sparse-24-bitmask.
        target: "vllm".
        to: the folder to write, which must not exist yet.
        progress: called with the progress; see `Progress`.

    Returns:
        the result, a record that belongs to the target.

    Raises:
        UsageError: the target takes bundles only, the folder exists, no layer is 2:4, or the
            program that loads the folder would refuse the model.
        ModelError: the model is missing, not readable or not supported.
        ResourceError: the disk is too small.
    """
    from thanos_deploy.stages.export import convert

    result: ExportResult = convert(
        _requests.model(model), Path(to), target=target, announce=_requests.announce(progress)
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
    """Measure the quality of one model by itself; the command `eval` without `--dense`.

    If the model is the folder of a bundle, nothing is written to the bundle; see `Bundle.evaluate`.

    Args:
        model: see `prune`; or the folder of a bundle.
        runtime: see `Bundle.evaluate`; or "vllm" for a running server.
        url: address of that server, such as "http://127.0.0.1:8000"; for "vllm" only.
        device, text, text_field, segments, seqlen, questions, tasks, task_folder, limit, progress:
            see `Bundle.evaluate`.
        revision: branch, tag or commit of a hub model.

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
    """Write one page about several bundles side by side; the command `report` with `--output`.

    Args:
        bundles: the bundles, or their folders; nothing is written there.
        output: the page, FILE.html; FILE.md and FILE.json are written beside it.
        allow_different_models: put bundles of different base models or tokenizers side by side.
        overwrite: replace FILE if it exists.

    Returns:
        what is in FILE.json.

    Raises:
        UsageError: the bundles are of different models, or the files cannot be written there.
        InputError: nothing has been pruned in a bundle yet, or it cannot be read.
        IntegrityError: a record was changed since it was written.
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
    """Forecast how fast a model would be on a GPU, without that GPU; the command `plan`.

    Only the model's configuration is read, so the weights are not needed either.

    Args:
        model: see `prune`.
        gpu: name of a GPU, such as "H100".
        pattern: patterns to compare with the dense model.
        batch: batch sizes; one forecast for each.
        prompt: tokens in each prompt.
        new_tokens: tokens generated after the prompt.
        dtype: dtype of the blocks' linear layers.
        measured: a file with times of matrix products that were measured on that GPU, such as
            `gpu-check` writes. Default: the measurements published with this project, if they
            include that GPU.
        prune: also forecast the time and memory that pruning to 2:4 takes on that GPU, for each
            preset.
        gpus: number of GPUs that prune together.
        nsamples: number of calibration segments for pruning.
        seqlen: tokens in each segment.
        revision: branch, tag or commit of a hub model.
        progress: called with the progress of converting a GGUF file; see `Progress`.

    Returns:
        the forecast.

    Raises:
        UsageError: the GPU is not known, it does not support the dtype, the model takes fewer
            tokens than were asked for, or pruning cannot be forecast because no layer was pruned on
            that GPU.
        ModelError: the model is missing or not supported.
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
        else read_measurements(Path(measured), product, dtype)
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
    """Check what this machine has for each target; the command `doctor`.

    Args:
        out: a bundle, to check also whether there is enough memory and disk to build its engine.
        check: raise for the first part that would fail; False to look at the result.

    Returns:
        a check for each part; a part that is missing is SKIP, with a way to get it.

    Raises:
        InputError: `out` is not a bundle, or has no ONNX graph yet.
        PlatformError: something that is installed would fail, and `check` is true.
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
    """Load the model in a folder into memory, in float32 and ready for inference.

    `AutoModelForCausalLM.from_pretrained` does the same for every checkpoint of a bundle except one
    whose blocks differ in width (`allocation="loss"`), which only this function loads.

    Args:
        folder: an ordinary checkpoint, such as `Bundle.model_path`.
        device: a device of PyTorch.

    Raises:
        ModelError: the model does not load.
        ResourceError: it does not fit into the GPU's memory.
    """
    import torch

    from thanos_deploy.model.load import load_model

    return load_model(Path(folder), torch.device(device))
