"""The stages of a bundle, from a dense model to a report; each is done once and kept.

    import   a GGUF file or a packed folder is unpacked       (in the cache)
    prune    model/, layers.json
    eval     eval/perplexity.json
    onnx     onnx/                                            (of the dense model: in the cache)
    genai    genai/                                           (only if asked for)
    packed   packed/                                          (only if asked for)
    bench    bench/latency.json, bench/sample.json
    report   report/report.json, README.md

The dense model that pruned ones are compared with is itself a bundle, in a cache folder named
after its hash, so several runs on one model convert, export and evaluate it once.
"""

import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

import exporters.genai
import exporters.onnx
import exporters.packed
from runtime import paired
from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from thanos_deploy import artifact, card, checkpoint, environment, report, sizing
from thanos_deploy import perplexity as quality
from thanos_deploy import prune as pruning
from thanos_deploy import shrink as shrinking
from thanos_deploy.artifact import Bundle, Json, StageRecord
from thanos_deploy.calibrate import BUILTIN, Text, builtin_text, read_text, segments
from thanos_deploy.checkpoint import DTYPES, Checkpoint, convert_gguf, convert_packed, locate
from thanos_deploy.errors import ResourceError, UsageError
from thanos_deploy.pattern import Pattern, parse
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.requests import BenchRequest, EvalRequest, ExportRequest, PruneRequest
from thanos_deploy.sizing import Losses, Plan

# Told the title of a piece of work that starts now, returns where to report its progress.
Announce = Callable[[str], OnProgress]

STAGES = ("prune", "eval", "onnx", "bench", "report")


def quietly(title: str) -> OnProgress:
    """Announce nothing."""
    return silent


def cache_folder() -> Path:
    """Where dense models are kept: $THANOS_DEPLOY_CACHE, else the user's cache folder."""
    if own := os.environ.get("THANOS_DEPLOY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "thanos-deploy"


class Dense:
    """The model that a bundle is made from, and its own bundle in the cache.

    Attributes:
        source: where it comes from.
        folder: its bundle in the cache.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        """Find a model; see `checkpoint.locate` for what it may be and what is raised."""
        self.source = locate(model, revision=revision)
        self.folder = cache_folder() / self.source.sha256[:16]
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self, announce: Announce = quietly) -> Checkpoint:
        """The model as a Hugging Face folder; a GGUF file or a packed folder is converted once."""
        if self._checkpoint is None:
            if not self.source.is_ordinary:
                self._convert(announce)
                self._checkpoint = Checkpoint.open(self.folder / "model")
            else:
                self._checkpoint = Checkpoint.open(self.source.path)
        return self._checkpoint

    def _convert(self, announce: Announce) -> None:
        def produce(folder: Path) -> Json:
            progress = announce(f"Convert {self.source.name}")
            progress(0, 1)
            convert = convert_gguf if self.source.kind == "gguf" else convert_packed
            convert(self.source.path, folder / "model")
            progress(1, 1)
            return {}

        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            bundle.run("import", produce, options={}, inputs={}, overwrite=True)

    def evaluate(self, request: EvalRequest, text: Text, announce: Announce) -> StageRecord:
        """Perplexity of the dense model."""
        dense = self.checkpoint(announce)
        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            return _evaluate(
                bundle, dense, request, text, {}, announce, title="dense model", overwrite=True
            )

    def export(self, request: ExportRequest, announce: Announce) -> StageRecord:
        """ONNX of the dense model."""
        dense = self.checkpoint(announce)
        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            return _export(
                bundle,
                dense,
                None,
                {},
                request,
                {"method": "none", "model_sha256": self.source.sha256},
                announce,
                title="dense model",
                overwrite=True,
            )


def prune_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    request: PruneRequest,
    *,
    on_progress: OnProgress = silent,
) -> list[pruning.BlockReport]:
    """Prune a checkpoint as requested, on given calibration tokens; see `prune.prune`."""
    return pruning.prune(
        source,
        ids,
        destination,
        pattern=request.pattern,
        method=request.method,
        options=request.resolved_options,
        **request.walk_options,
        dtype=DTYPES.get(request.dtype),
        on_progress=on_progress,
    )


def survey_blocks(
    source: Checkpoint, ids: Tensor, request: PruneRequest, announce: Announce = quietly
) -> list[Losses]:
    """What each block would lose at which widths; the same for every fraction to remove."""
    fit = request.fit_options
    return shrinking.survey(
        source,
        ids,
        multiple=request.ffn_multiple,
        damping=fit["damping"],
        damping_mode=fit["damping_mode"],
        on_progress=announce("Find out what each block would lose"),
    )


def plan_widths(source: Checkpoint, losses: Sequence[Losses], request: PruneRequest) -> Plan:
    """How wide the blocks of a shrunk model will be."""
    return sizing.plan(source, losses, request.pattern.sparsity, **request.sizing_options)


def shrink_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    request: PruneRequest,
    plan: Plan,
    announce: Announce = quietly,
) -> list[shrinking.BlockReport]:
    """Cut heads and channels out of a checkpoint as planned; see `shrink.shrink`."""
    return shrinking.shrink(
        source,
        ids,
        destination,
        plan=plan,
        **request.fit_options,
        dtype=DTYPES.get(request.dtype),
        on_progress=announce(f"Cut {plan.removed:.1%} out of the blocks and refit the rest"),
    )


def prune(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Prune the model into the bundle, unless that is done."""
    source = dense.checkpoint(announce)
    _refuse_pruning(source, request)
    text = _text(request.calib, request.text_field, held_out=False)
    ids = _segments(source, text, request.nsamples, request.seqlen, seed=request.seed)

    def produce(folder: Path) -> Json:
        (folder / "model").mkdir()
        _require_disk(folder, _bytes_of(source, request.dtype))
        blocks: Sequence[pruning.BlockReport | shrinking.BlockReport]
        if request.shrinks:
            losses = survey_blocks(source, ids, request, announce)
            plan = plan_widths(source, losses, request)
            blocks = shrink_checkpoint(source, ids, folder / "model", request, plan, announce)
            summary = {**_summary_of_cuts(blocks), "widths": _plan_summary(plan)}
        else:
            progress = announce(f"Prune to {request.pattern} with {request.method}")
            blocks = prune_checkpoint(source, ids, folder / "model", request, on_progress=progress)
            summary = _summary_of(blocks)
        artifact.write_json(folder / "layers.json", [asdict(block) for block in blocks])
        return {
            **summary,
            **{
                f"{activity}_seconds": sum(block.seconds.get(activity, 0.0) for block in blocks)
                for activity in ("collect", "solve", "forward")
            },
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "dense_bytes": _bytes_of(source, "auto"),
        }

    return bundle.run(
        "prune",
        produce,
        options=request.to_json(),
        inputs={"model": dense.source.sha256, "text": text.sha256},
        overwrite=overwrite,
    )


def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Measure the perplexity of the dense and the pruned model, unless that is done."""
    pruned = bundle.require("prune", "`thanos-deploy prune`")
    bundle.check("eval", request.to_json(), overwrite=overwrite)
    text = _text(request.text, request.text_field, held_out=True)
    _require_other_text(text, pruned.inputs["text"])
    reference = dense.evaluate(request, text, announce)
    return _evaluate(
        bundle,
        Checkpoint.open(bundle.path / "model"),
        request,
        text,
        {"model": _model_hash(bundle), "dense": reference.result},
        announce,
        title="pruned model",
        overwrite=overwrite,
    )


def export(
    bundle: Bundle,
    *,
    target: str = "onnx",
    request: ExportRequest | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Export the pruned model to a target, unless that is done.

    Args:
        bundle: with the stage prune finished.
        target: a name from `exporters.names()`.
        request: None for what the graph that is already there was made with, else the defaults.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.
    """
    pruned = bundle.require("prune", "`thanos-deploy prune`")
    model = Checkpoint.open(bundle.path / "model")
    # Rows that were left dense on purpose keep no pattern, and what was cut out leaves none.
    claimed = parse(pruned.options["pattern"]) if pruned.result.get("pattern_holds") else None
    if target == "packed":
        return _export_packed(bundle, model, claimed, overwrite, announce)
    graph = _export(
        bundle,
        model,
        claimed,
        {"model": _model_hash(bundle)},
        request or exported_with(bundle),
        {"method": pruned.options["method"], "model_sha256": _model_hash(bundle)},
        announce,
        title="pruned model",
        overwrite=overwrite,
    )
    return graph if target == "onnx" else _export_genai(bundle, overwrite, announce)


def exported_with(bundle: Bundle) -> ExportRequest:
    """What the graph of a bundle was made with; the defaults if there is none."""
    return (
        ExportRequest(**bundle.stages["onnx"].options)
        if "onnx" in bundle.stages
        else ExportRequest()
    )


def _export_packed(
    bundle: Bundle,
    model: Checkpoint,
    pattern: Pattern | None,
    overwrite: bool,
    announce: Announce,
) -> StageRecord:
    exporters.packed.refuse(pattern)

    def produce(folder: Path) -> Json:
        _require_disk(folder, 2 * _bytes_of(model, "auto"))
        (folder / "packed").mkdir()
        return exporters.packed.export(
            model,
            folder / "packed",
            pattern=pattern,
            on_progress=announce("Pack the checkpoint and unpack it again to compare"),
        )

    return bundle.run(
        "packed",
        produce,
        options={},
        inputs={"model": _model_hash(bundle)},
        overwrite=overwrite,
    )


def _export_genai(bundle: Bundle, overwrite: bool, announce: Announce) -> StageRecord:
    def produce(folder: Path) -> Json:
        graph = bundle.stages["onnx"].files.values()
        _require_disk(folder, sum(file.bytes for file in graph))
        (folder / "genai").mkdir()
        return exporters.genai.export(
            bundle.path / "onnx",
            bundle.path / "model",
            folder / "genai",
            on_progress=announce("Write the folder for ORT-GenAI and try it out"),
        )

    return bundle.run(
        "genai",
        produce,
        options={},
        inputs={
            "model": _model_hash(bundle),
            "onnx": {name: file.sha256 for name, file in bundle.stages["onnx"].files.items()},
        },
        overwrite=overwrite,
    )


def bench(
    bundle: Bundle,
    dense: Dense,
    request: BenchRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Time the pruned model beside the dense one on ONNX Runtime, unless that is done."""
    bundle.require("onnx", "`thanos-deploy export --target onnx`")
    bundle.check("bench", asdict(request), overwrite=overwrite)
    reference = dense.export(exported_with(bundle), announce)
    subjects = {"dense": dense.folder, "pruned": bundle.path}

    def produce(folder: Path) -> Json:
        out = folder / "bench"
        out.mkdir()
        measured = paired.compare(
            subjects,
            request.workload,
            rounds=request.rounds,
            warmup=request.warmup,
            on_progress=announce("Measure latency and memory, dense and pruned in turns"),
        )
        samples = {label: asdict(measurement) for label, measurement in measured.items()}
        artifact.write_json(
            out / "latency.json",
            {
                "backend": "onnxruntime",
                "provider": "CPUExecutionProvider",
                "request": asdict(request),
                "subjects": samples,
                "environment": environment.describe(),
            },
        )
        texts = {
            label: _sample(path, bundle.path / "model", request) for label, path in subjects.items()
        }
        artifact.write_json(out / "sample.json", {"prompt": request.sample_prompt, **texts})
        return {"subjects": samples, "sample": texts}

    return bundle.run(
        "bench",
        produce,
        options=asdict(request),
        inputs={
            label: {name: file.sha256 for name, file in record.files.items()}
            for label, record in (("dense", reference), ("pruned", bundle.stages["onnx"]))
        },
        overwrite=overwrite,
    )


def write_report(bundle: Bundle, dense: Dense) -> Json:
    """Put what the finished stages say into report.json and the model card; return the report."""

    def produce(folder: Path) -> Json:
        (folder / "report").mkdir()
        content = report.build(bundle, Bundle.open(dense.folder))
        artifact.write_json(folder / "report" / "report.json", content)
        (folder / "README.md").write_text(card.write(content), encoding="utf-8")
        return content

    return bundle.run(
        "report",
        produce,
        options={},
        inputs={
            name: record.finished for name, record in bundle.stages.items() if name != "report"
        },
        overwrite=True,
    ).result


@contextmanager
def reopen(out: Path, model: str) -> Iterator[tuple[Bundle, Dense]]:
    """A bundle for further stages, and the dense model that it was made from.

    Raises:
        InputError: there is no bundle.
        UsageError: it was made from another model.
        ResourceError: another process is writing there.
    """
    Bundle.open(out)  # claiming would create one
    dense = Dense(model)
    with artifact.claim(out, dense.source.to_json()) as bundle:
        yield bundle, dense


def prune_export(
    model: str,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmark: BenchRequest,
    target: str = "onnx",
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Json:
    """Every stage, from a dense model to its report. Repeating the call continues or confirms it.

    Raises:
        DeployError: of any kind; everything that can be refused beforehand is.
    """
    dense = Dense(model, revision=revision)
    if target == "genai":
        exporters.genai.library()
    if target == "packed":
        exporters.packed.refuse(request.pattern)
    with artifact.claim(out, dense.source.to_json(), overwrite=overwrite) as bundle:
        _refuse_beforehand(bundle, dense, request, evaluation, benchmark, overwrite, announce)
        prune(bundle, dense, request, overwrite=overwrite, announce=announce)
        evaluate(bundle, dense, evaluation, overwrite=overwrite, announce=announce)
        for wanted in dict.fromkeys(("onnx", target)):  # the graph is measured in any case
            export(bundle, target=wanted, overwrite=overwrite, announce=announce)
        bench(bundle, dense, benchmark, overwrite=overwrite, announce=announce)
        return write_report(bundle, dense)


def plan(
    model: str,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmark: BenchRequest,
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Json:
    """What `prune_export` would do, and whether it would be refused; writes nothing to `out`."""
    dense = Dense(model, revision=revision)
    bundle = (
        Bundle.open(out)
        if (out / artifact.MANIFEST).exists()
        else Bundle(out, dense.source.to_json())
    )
    _refuse_beforehand(bundle, dense, request, evaluation, benchmark, overwrite, announce)
    source = dense.checkpoint(announce)
    parameters = _parameters(source)
    return {
        **_plan_pruning(dense, request, announce),
        "eval": evaluation.to_json(),
        "bench": asdict(benchmark),
        "stages": {name: "done" if name in bundle.stages else "to do" for name in STAGES},
        "disk_bytes_needed": _bytes_of(source, request.dtype) + 4 * parameters,
        "disk_bytes_free": shutil.disk_usage(_existing(out)).free,
        "cache": str(dense.folder),
        "cache_bytes_needed": (4 if dense.source.is_ordinary else 8) * parameters,
    }


def outline(model: str, *, revision: str | None, announce: Announce) -> Checkpoint:
    """The sizes of a model, from its configuration alone; only a GGUF file is converted first."""
    folder = checkpoint.locate_configuration(model, revision=revision)
    if folder is None:
        return Dense(model).checkpoint(announce)
    return Checkpoint.outline(folder)


def plan_prune(
    model: str,
    request: PruneRequest,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> Json:
    """What `prune` would do, and whether it would be refused; writes nothing.

    For a model that is to be shrunk this includes the widths of every block and the loss that is
    predicted for them, from a walk through the dense model.
    """
    dense = Dense(model, revision=revision)
    _refuse_pruning(dense.checkpoint(announce), request)
    return _plan_pruning(dense, request, announce)


def _plan_pruning(dense: Dense, request: PruneRequest, announce: Announce) -> Json:
    source = dense.checkpoint(announce)
    shapes = pruning.linear_shapes(source).values()
    weights = sum(rows * cols for rows, cols in shapes)
    plan = {
        "model": dense.source.to_json(),
        "model_type": source.config.model_type,
        "parameters": _parameters(source),
        "linear_layers": len(shapes),
        "linear_weights": weights,
        "prune": request.to_json(),
    }
    if request.shrinks:
        text = _text(request.calib, request.text_field, held_out=False)
        ids = _segments(source, text, request.nsamples, request.seqlen, seed=request.seed)
        losses = survey_blocks(source, ids, request, announce)
        plan["widths"] = _plan_summary(plan_widths(source, losses, request))
    else:
        plan["linear_weights_removed"] = int(weights * request.pattern.sparsity)
    return plan


def _refuse_beforehand(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmark: BenchRequest,
    overwrite: bool,
    announce: Announce,
) -> None:
    """Raise now what a later stage would raise after minutes of work."""
    for stage, options in (
        ("prune", request.to_json()),
        ("eval", evaluation.to_json()),
        ("bench", asdict(benchmark)),
    ):
        bundle.check(stage, options, overwrite=overwrite)
    source = dense.checkpoint(announce)
    _refuse_pruning(source, request)
    tokens = benchmark.prompt + benchmark.new_tokens
    if tokens > source.max_positions:
        raise UsageError(
            f"a prompt of {benchmark.prompt} and {benchmark.new_tokens} new tokens; the model "
            f"takes {source.max_positions}",
            fix="use a shorter --prompt or fewer --new-tokens",
        )
    calibration = _text(request.calib, request.text_field, held_out=False)
    _segments(source, calibration, request.nsamples, request.seqlen, seed=request.seed)
    text = _text(evaluation.text, evaluation.text_field, held_out=True)
    _segments(source, text, evaluation.segments, evaluation.seqlen, seed=None)
    _require_other_text(text, calibration.sha256)


def _refuse_pruning(source: Checkpoint, request: PruneRequest) -> None:
    """Raise what pruning would raise, as far as configuration and headers show it."""
    request.check()
    if request.shrinks:
        shrinking.check(source)
        sizing.check(source, request.pattern.sparsity, **request.sizing_options)
    else:
        pruning.check(
            source, pattern=request.pattern, method=request.method, options=request.resolved_options
        )


def _evaluate(
    bundle: Bundle,
    model: Checkpoint,
    request: EvalRequest,
    text: Text,
    inputs: Json,
    announce: Announce,
    *,
    title: str,
    overwrite: bool,
) -> StageRecord:
    def produce(folder: Path) -> Json:
        ids = _segments(model, text, request.segments, request.seqlen, seed=None)
        progress = announce(f"Perplexity of the {title}")
        measured = quality.perplexity(
            checkpoint.load_model(model.folder), ids, on_progress=progress
        )
        result = {"text": text.origin, **asdict(measured)}
        (folder / "eval").mkdir()
        artifact.write_json(folder / "eval" / "perplexity.json", {**result, **inputs})
        return result

    return bundle.run(
        "eval",
        produce,
        options=request.to_json(),
        inputs={**inputs, "text": text.sha256},
        overwrite=overwrite,
    )


def _export(
    bundle: Bundle,
    model: Checkpoint,
    pattern: Pattern | None,
    inputs: Json,
    request: ExportRequest,
    origin: Mapping[str, str],
    announce: Announce,
    *,
    title: str,
    overwrite: bool,
) -> StageRecord:
    def produce(folder: Path) -> Json:
        _require_disk(folder, 4 * _parameters(model))
        (folder / "onnx").mkdir()
        record = exporters.onnx.export(
            model,
            folder / "onnx",
            pattern=pattern,
            dtype=request.dtype,
            max_sequence=request.max_sequence,
            origin=origin,
            on_progress=announce(f"Export the {title} to ONNX and compare it with PyTorch"),
        )
        return {
            "max_sequence": record["max_sequence"],
            "cache_bytes_per_token": record["cache"]["bytes_per_token"],
            "rounding": record["rounding"],
            "parity_limit": record["parity_limit"],
            "parity": record["parity"],
            "weights": len(record["weights"]),
        }

    return bundle.run("onnx", produce, options=asdict(request), inputs=inputs, overwrite=overwrite)


def _text(name: str, text_field: str, *, held_out: bool) -> Text:
    if name == BUILTIN:
        return builtin_text(held_out=held_out)
    return read_text(Path(name).expanduser(), text_field=text_field)


def _require_other_text(text: Text, calibration_sha256: str) -> None:
    if text.sha256 == calibration_sha256:
        raise UsageError(
            f"{text.origin}: the model is pruned on this very text, so its perplexity there "
            "says nothing",
            fix="give another text with --eval-text",
        )


def _segments(
    source: Checkpoint, text: Text, count: int, length: int, *, seed: int | None
) -> Tensor:
    if not 2 <= length <= source.max_positions or count < 1:
        raise UsageError(
            f"{count} segments of {length} tokens; the model takes 2 to {source.max_positions} "
            "tokens at once",
            fix="use at least one segment, of a length that the model takes",
        )
    tokenizer = checkpoint.load_tokenizer(source.folder)
    return segments(text, tokenizer, count=count, length=length, seed=seed)


def _sample(bundle: Path, model: Path, request: BenchRequest) -> str:
    """What the exported model of a bundle makes of the sample prompt."""
    tokenizer = checkpoint.load_tokenizer(model)
    prompt = tokenizer(request.sample_prompt, add_special_tokens=False)["input_ids"]
    ids = generate(
        # `paired` has just compared the hashes.
        open_engine(bundle, verify=False),
        prompt,
        new_tokens=request.sample_tokens,
        stop=stop_ids(model),
    )
    return str(tokenizer.decode(list(ids)))


def _summary_of(blocks: list[pruning.BlockReport]) -> Json:
    layers = [layer for block in blocks for layer in block.layers]
    worst = max(layers, key=lambda layer: layer.relative_error)
    weights = sum(layer.rows * layer.cols for layer in layers)
    return {
        "layers": len(layers),
        "weights": weights,
        "sparsity": sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / weights,
        "pattern_holds": all(layer.pattern_holds for layer in layers),
        "layers_off_pattern": [layer.name for layer in layers if not layer.pattern_holds],
        "median_relative_error": statistics.median(layer.relative_error for layer in layers),
        "worst_relative_error": worst.relative_error,
        "worst_layer": worst.name,
        "largest_damping": max(layer.damping for layer in layers),
    }


def _summary_of_cuts(blocks: list[shrinking.BlockReport]) -> Json:
    errors = {
        f"block {index}, {part}": error
        for index, block in enumerate(blocks)
        for part, error in (("heads", block.heads_error), ("ffn", block.channels_error))
    }
    worst = max(errors, key=errors.__getitem__)
    return {
        "median_relative_error": statistics.median(errors.values()),
        "worst_relative_error": errors[worst],
        "worst_layer": worst,
        "largest_damping": max(block.damping for block in blocks),
    }


def _plan_summary(plan: Plan) -> Json:
    """For people and for the manifest: one row a block, and what they come to."""
    return {
        "removed": plan.removed,
        "stock_config": plan.stock,
        "block_parameters_before": sum(block.parameters_before for block in plan.blocks),
        "block_parameters_after": sum(block.parameters_after for block in plan.blocks),
        "predicted_loss": sum(block.predicted_loss for block in plan.blocks) / len(plan.blocks),
        "blocks": [asdict(block) for block in plan.blocks],
    }


def _model_hash(bundle: Bundle) -> str:
    """One hash for the pruned model: over the hashes of its files."""
    files = bundle.stages["prune"].files
    return artifact.sha256_of(
        {name: file.sha256 for name, file in files.items() if name.startswith("model/")}
    )


def _bytes_of(source: Checkpoint, dtype: str) -> int:
    """Size of the model's weights when stored in a dtype."""
    weights = source.weights
    return sum(
        math.prod(shape) * DTYPES.get(dtype, weights.dtypes[name]).itemsize
        for name, shape in weights.shapes.items()
    )


def _parameters(source: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in source.weights.shapes.values())


def _require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {needed / 1e9:.1f} GB needed on disk, {free / 1e9:.1f} GB free",
            fix="free some space, or give another folder with -o or $THANOS_DEPLOY_CACHE; what is "
            "finished is kept, and repeating the command continues",
        )


def _existing(path: Path) -> Path:
    """The path itself or the nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
