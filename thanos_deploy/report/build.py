"""Make the report on one bundle, or on several side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal

from exporters import targets
from exporters.options import GRAPHS, exported_with
from thanos_deploy import __version__
from thanos_deploy.bundle import layout
from thanos_deploy.bundle.manifest import StageRecord
from thanos_deploy.errors import UsageError
from thanos_deploy.measure.quality import (
    EVAL,
    EVAL_ONNX,
    EVAL_TASKS,
    EVAL_TASKS_ONNX,
    Answers,
    TaskStage,
    TextStage,
)
from thanos_deploy.measure.run import DENSE, Run
from thanos_deploy.model import loaders
from thanos_deploy.model.block import BlockPlan
from thanos_deploy.model.layer_names import any_expert, place_of
from thanos_deploy.model.loaders import LoaderVerdict
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.result import PRUNE, PrunedBlock, PrunedLayer
from thanos_deploy.report import commands, pareto, words
from thanos_deploy.report.model import (
    FORMAT,
    AnsweredQuestions,
    CutWidths,
    ExportSummary,
    FileBytes,
    LayerMap,
    ModelReport,
    Pair,
    Parity,
    Quality,
    Report,
    TaskScores,
    WidthRange,
)
from thanos_deploy.report.runs import quoted
from thanos_deploy.report.sources import Sources
from thanos_deploy.shrink.result import CutBlock


def build(bundles: Sequence[Sources], *, allow_different_models: bool = False) -> Report:
    """Make the report on some bundles.

    Args:
        bundles: sources of one or more bundles.
        allow_different_models: accept bundles of different base models or tokenizers.

    Raises:
        UsageError: the base models or tokenizers differ, and that is not allowed.
    """
    if not allow_different_models:
        _require_one_model(bundles)
    models = [
        _model(sources, label) for sources, label in zip(bundles, _labels(bundles), strict=True)
    ]
    plots = pareto.plots(models) if len(models) > 1 else []
    return Report(
        format=FORMAT,
        made_with=__version__,
        title=words.title(models),
        headline=words.comparison(models, plots) if len(models) > 1 else models[0].headline,
        notices=(*_differences(models), *(text for one in models for text in words.notices(one))),
        models=tuple(models),
        pareto=tuple(plots),
    )


def _model(sources: Sources, label: str) -> ModelReport:
    bundle, stages = sources.bundle, sources.stages
    options, result = bundle.options(PRUNE), bundle.result(PRUNE)
    model = ModelReport(
        label=label,
        source=bundle.source,
        pattern=str(parse(options.pattern)),
        method=options.method,
        quality=_quality(sources, EVAL),
        graph_quality=_quality(sources, EVAL_ONNX),
        fidelity=bundle.result(EVAL).fidelity if sources.has(EVAL) else None,
        answers=tuple(_answers(sources)),
        tasks=(
            *_tasks(sources, EVAL_TASKS, "torch"),
            *_tasks(sources, EVAL_TASKS_ONNX, "onnx"),
        ),
        linear_layers=result.linear_layers,
        layer_map=_layer_map(sources.blocks),
        widths=_widths(sources),
        choices=result.choices,
        loaders=_loaders(sources),
        bytes=_bytes(sources),
        parts=result.parts,
        export=_export(sources),
        bench=tuple(
            _doubted(sources, name, run).without_samples for name, run in sources.runs.items()
        ),
        kernels=tuple(sources.engines.values()),
        sample=sources.sample,
        stale=sources.stale,
        commands=tuple(commands.of(sources)),
        seconds={name: record.seconds for name, record in stages.items()},
        options={name: record.options for name, record in stages.items() if record.options},
        environment=stages[layout.PRUNE].environment,
    )
    run = quoted(model)
    return replace(
        model,
        quoted_run=None if run is None else run.run,
        headline=words.headline(model, run),
        verdict=tuple(words.verdict(model, run)),
        not_measured=tuple(words.not_measured(model)),
    )


def _labels(bundles: Sequence[Sources]) -> list[str]:
    """Return a distinct label for each bundle.

    A label has the pattern and, as far as is needed to tell the bundles apart, dtype, method and
    folder.
    """
    parts = []
    for sources in bundles:
        options = sources.bundle.options(PRUNE)
        folder = sources.bundle.path.resolve().name
        parts.append([options.pattern, _dtype(sources) or "fp32", options.method, folder])
    for length in range(1, len(parts[0]) + 1):
        labels = [" ".join(part[:length]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, start=1)]


def _require_one_model(bundles: Sequence[Sources]) -> None:
    first = bundles[0]
    for other in bundles[1:]:
        for what, own, theirs in (
            ("base models", first.bundle.source.sha256, other.bundle.source.sha256),
            ("tokenizers", _tokenizer(first), _tokenizer(other)),
        ):
            if own != theirs:
                raise UsageError(
                    f"{first.bundle.path} and {other.bundle.path} have different {what}: "
                    f"{first.bundle.source.name} ({str(own)[:12]}) and "
                    f"{other.bundle.source.name} ({str(theirs)[:12]})",
                    fix="compare bundles of one model, or give --allow-different-models; "
                    "perplexities over different tokenizers cannot be compared",
                )


def _tokenizer(sources: Sources) -> str | None:
    """Return the SHA-256 of the tokenizer file; None if the bundle has none."""
    found = sources.stages[layout.PRUNE].files.get(layout.TOKENIZER)
    return None if found is None else found.sha256


def _differences(models: Sequence[ModelReport]) -> Iterator[str]:
    """Yield warnings about differences that make figures of the models incomparable."""
    if len({model.source.sha256 for model in models}) > 1:
        yield "The base models differ, so differences are not those of the patterns alone."
    if len({model.quality.measured_on for model in models if model.quality}) > 1:
        yield "The perplexities are of different texts or lengths and cannot be compared."
    machines = {
        (run.environment.processor, run.environment.cores)
        for model in models
        if (run := quoted(model))
    }
    if len(machines) > 1:
        yield "Latency was measured on different machines: compare ratios, not milliseconds."


def _quality(sources: Sources, stage: TextStage) -> Quality | None:
    if not sources.has(stage):
        return None
    pruned, dense = sources.bundle.result(stage), sources.bundle.inputs(stage).dense
    if dense is None:
        return None
    return Quality(
        text=pruned.text,
        segments=pruned.segments,
        length=pruned.length,
        frame=pruned.frame.tokens,
        dense=dense.value,
        pruned=pruned.value,
        ratio=pruned.value / dense.value,
    )


def _answers(sources: Sources) -> Iterator[AnsweredQuestions]:
    """Yield the accuracy of both models on each kind of questions about the text."""
    if not sources.has(EVAL):
        return
    pruned, dense = sources.bundle.result(EVAL), sources.bundle.inputs(EVAL).dense
    if dense is None:
        return
    kinds: tuple[
        tuple[Literal["last words", "multiple choice"], Answers | None, Answers | None], ...
    ]
    kinds = (
        ("last words", dense.words, pruned.words),
        ("multiple choice", dense.choices, pruned.choices),
    )
    for kind, before, after in kinds:
        if before is not None and after is not None and after.change is not None:
            shares = before.accuracy, after.accuracy, after.change
            yield AnsweredQuestions(kind, after.questions, *shares)


def _tasks(sources: Sources, stage: TaskStage, runtime: str) -> Iterator[TaskScores]:
    """Yield the scores of the dense and the pruned model in each task."""
    if not sources.has(stage):
        return
    found, reference = sources.bundle.result(stage), sources.bundle.inputs(stage).dense
    for dense, pruned in zip(reference.scores if reference else (), found.scores, strict=True):
        yield TaskScores(
            task=pruned.task,
            metric=pruned.metric,
            samples=pruned.samples,
            runtime=runtime,
            dense=dense.value,
            pruned=pruned.value,
            dense_stderr=dense.stderr,
            pruned_stderr=pruned.stderr,
        )


def _layer_map(blocks: Sequence[PrunedBlock | CutBlock]) -> LayerMap:
    """Return the error and the removed fraction of every layer, block by block."""
    rows = [_row(block) for block in blocks]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, (None, None)) for name in columns] for row in rows]
    return LayerMap(
        columns=columns,
        error=tuple(tuple(error for error, _ in row) for row in cells),
        gone=tuple(tuple(gone for _, gone in row) for row in cells),
    )


def _row(block: PrunedBlock | CutBlock) -> dict[str, tuple[float, float]]:
    """Return error and removed fraction of every layer by name, or of the heads and channels."""
    if isinstance(block, CutBlock):
        before, after = block.before, block.after
        return {
            "heads": (block.heads_error, 1.0 - after.heads / before.heads),
            "channels": (block.channels_error, 1.0 - after.channels / before.channels),
        }
    alike: dict[str, list[PrunedLayer]] = {}
    for layer in block.layers:
        alike.setdefault(any_expert(place_of(layer.name)[1]), []).append(layer)
    return {
        name: (fmean(one.relative_error for one in its), fmean(one.sparsity for one in its))
        for name, its in alike.items()
    }


def _widths(sources: Sources) -> CutWidths | None:
    """Return what was cut out; None if all shapes are the dense model's."""
    widths = sources.bundle.result(PRUNE).widths
    if widths is None:
        return None
    left = [block for block in widths.blocks if not block.after.dropped]
    routed = [block for block in left if block.before.experts]
    return CutWidths(
        removed=widths.removed,
        stock_config=widths.stock_config,
        block_parameters_before=widths.block_parameters_before,
        block_parameters_after=widths.block_parameters_after,
        heads=_range(left, "heads"),
        kv_heads=_range(left, "kv_heads"),
        channels=_range(left, "channels"),
        experts=_range(routed, "experts") if routed else None,
        dropped=tuple(number for number, block in enumerate(widths.blocks) if block.after.dropped),
    )


def _range(blocks: Sequence[BlockPlan], part: str) -> WidthRange:
    return WidthRange(
        before=tuple(sorted({getattr(block.before, part) for block in blocks})),
        after=tuple(sorted({getattr(block.after, part) for block in blocks})),
    )


def _loaders(sources: Sources) -> tuple[LoaderVerdict, ...]:
    """Judge which loaders take the checkpoint; empty if no stock config.json describes it."""
    widths = sources.bundle.result(PRUNE).widths
    if sources.config is None or (widths is not None and not widths.stock_config):
        return ()
    found = tuple(loaders.judge(sources.config))
    if _dtype(sources) == "fp32":
        found += (loaders.openvino(sources.config["model_type"]),)
    return found


def _bytes(sources: Sources) -> FileBytes:
    """Return the sizes of the weight files; the dense size of a graph is known only from a run."""
    stages, dense = sources.stages, sources.bundle.result(PRUNE).dense_bytes
    graphs = [
        run.subjects[DENSE].file_bytes for run in sources.runs.values() if DENSE in run.subjects
    ]
    beside = {"checkpoint": dense, "graph": graphs[-1] if graphs else None}
    exported = [
        (target.name, target.size, stages[target.name])
        for target in targets.every()
        if target.size is not None and target.name in stages
    ]
    return FileBytes(
        model=Pair(dense, _size(stages[layout.PRUNE], ".safetensors")),
        targets={
            name: Pair(beside[size.beside], _size(record, *size.endings))
            for name, size, record in sorted(exported, key=lambda found: found[1].beside)
        },
    )


def _size(record: StageRecord, *endings: str) -> int:
    return sum(file.bytes for name, file in record.files.items() if name.endswith(endings))


def _dtype(sources: Sources) -> str | None:
    """Return the dtype of the exported graph; None if there is no graph."""
    return exported_with(sources.bundle).dtype if layout.ONNX in sources.stages else None


def _export(sources: Sources) -> ExportSummary | None:
    dtype = _dtype(sources)
    if dtype is None:
        return None
    graph = sources.bundle.result(GRAPHS)
    weights = sources.weights
    judged = [weight.pattern_holds for weight in weights if weight.pattern_holds is not None]
    return ExportSummary(
        dtype=dtype,
        rounding=graph.rounding,
        weights=len(weights),
        weights_on_pattern=sum(judged) if judged else None,
        parity=Parity(
            limit=graph.parity_limit,
            cases=len(graph.parity),
            worst=max(max(case.logits_error, case.cache_error) for case in graph.parity),
        ),
    )


def _doubted(sources: Sources, name: str, run: Run) -> Run:
    """Return a run, marked INVALID if it is finished but not in the manifest."""
    if name not in sources.unrecorded or run.status == "INTERRUPTED":
        return run
    doubt = f"{name} is not in the manifest, so it may be of another model"
    return replace(run, status="INVALID", reasons=(*run.reasons, doubt))
