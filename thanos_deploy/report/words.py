"""Sentences that explain the figures of a report."""

from collections.abc import Iterator, Sequence
from typing import Any

from exporters import targets
from exporters.target import Target
from thanos_deploy.bundle import layout
from thanos_deploy.errors import UsageError
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.measure.quality import Fidelity
from thanos_deploy.measure.run import Interval, Run
from thanos_deploy.pattern import SemiStructured, Structured, parse
from thanos_deploy.pruning.budget import ranges
from thanos_deploy.pruning.result import Retry
from thanos_deploy.report.model import (
    AnsweredQuestions,
    CutWidths,
    ExportSummary,
    FileBytes,
    Gap,
    ModelReport,
    Plot,
    Quality,
)
from thanos_deploy.report.runs import quoted_on_gpu, quoted_times

# Stage -> what it measures, and the command that runs it.
_STAGES = {
    layout.EVAL: ("perplexity", "thanos-deploy eval OUT --dense MODEL"),
    layout.BENCH: ("latency and memory", "thanos-deploy bench OUT"),
}


def title(models: Sequence[ModelReport]) -> str:
    """Return the title of a report: the base models, and the pattern or the number of models."""
    names = ", ".join(dict.fromkeys(model.source.name for model in models))
    if len(models) > 1:
        return f"{names}: {len(models)} models side by side"
    return f"{names}, {models[0].pattern} with {models[0].method}"


def headline(model: ModelReport, run: Run | None) -> str:
    """Return the result of one model in one sentence."""
    clauses = []
    if quality := model.quality:
        clauses.append(
            f"perplexity went from {quality.dense:.2f} to {quality.pruned:.2f} "
            f"({quality.ratio:.2f}x)"
        )
    else:
        clauses.append("the perplexity was not measured")
    size = model.bytes.deployed
    if size.dense:
        clauses.append(f"the files take {size.pruned / size.dense:.2f}x the bytes")
    times = [f"{name} {_outcome(ratio)}" for name, ratio in quoted_times(run)]
    if run is None or not times:
        clauses.append("latency was not measured")
    else:
        where = "on this CPU" if run.on_cpu else f"on {run.processor}"
        clauses.append(f"{where}, {' and '.join(times)}")
        if run.status != "VALID":
            clauses.append(f"but that run is {run.status}")
    return f"{model.pattern} with {model.method}: {'; '.join(clauses)}."


def comparison(models: Sequence[ModelReport], plots: Sequence[Plot]) -> str:
    """Say which of several models are worth their loss of quality, and by which costs."""
    points = [point for plot in plots for point in plot.points]
    if not points:
        return f"{len(models)} models; nothing was measured that can be compared."
    worth: dict[tuple[str, ...], list[str]] = {}
    shown = {point.label for point in points}
    for model in (one for one in models if one.label in shown):
        costs = tuple(
            plot.cost
            for plot in plots
            if any(p.label == model.label and not p.dominated_by for p in plot.points)
        )
        worth.setdefault(costs, []).append(model.label)
    lost = worth.pop((), [])
    clauses = [f"{_and(labels)} by {_and(costs)}" for costs, labels in worth.items()]
    said = [
        f"Worth its loss of quality, because no better model is as cheap: {'; '.join(clauses)}."
        if clauses
        else "No pruned model is worth its loss of quality: for each there is a better model that "
        "is no more expensive."
    ]
    if clauses and lost:
        said.append(f"For {_and(lost)} there is always a better model that is no more expensive.")
    if left := [model.label for model in models if model.label not in shown]:
        said.append(f"Not comparable, because the quality or all costs are missing: {_and(left)}.")
    if not all(point.valid for point in points):
        said.append("Some times are from runs that are not VALID.")
    return " ".join(said)


def _and(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def notices(model: ModelReport) -> Iterator[str]:
    """Yield the warnings that a reader must not overlook."""
    for run in model.bench:
        if run.status != "VALID" and run.owner is None:  # else its owner's report warns
            reasons = "; ".join(run.reasons) or "no reason was recorded"
            yield (
                f"{run.status}: the timing run {run.run!r} of {model.label} does not "
                f"count ({reasons})."
            )
    for retry in model.linear_layers.retries or ():
        yield f"{retried(retry)} ({model.label})."
    for stage in model.stale:
        yield (
            f"Stage {stage!r} of {model.label} was made from an earlier model and is left out; "
            "repeat it with --overwrite."
        )


def not_measured(model: ModelReport) -> list[Gap]:
    """Return what was not measured, why, and the command that measures it."""
    return list(_gaps(model))


def verdict(model: ModelReport, run: Run | None) -> list[str]:
    """Return the sentences that explain the figures of one model.

    Args:
        model: the model's part of the report.
        run: the benchmark run that is quoted for it; None if there is none.
    """
    return [
        *_of_quality(model.quality),
        *_of_fidelity(model.fidelity),
        *map(_of_answers, model.answers),
        *_of_graph(model.quality, model.graph_quality, model.export),
        *(_of_cuts(model.widths) if model.widths else ()),
        *((model.choices.sentence,) if model.choices else ()),
        *_of_times(run),
        *_of_own_gpu(model, quoted=run),
        *(() if model.widths else _of_zeros(model)),
        *_of_gpus(model),
        *_of_sizes(model.bytes),
    ]


def on_gpu(model: ModelReport) -> str:
    """Describe a model on a GPU: its own run, then the published figures of its pattern."""
    found = [*_of_own_gpu(model), *_of_gpus(model)]
    return " ".join(found) or f"On a GPU: {NOT_MEASURED}."


def retried(retry: Retry) -> str:
    """Say how a layer was solved whose statistics did not allow the requested solution."""
    layer, solver, failures = retry.layer, retry.solver, "; ".join(retry.failures)
    if retry.damping:
        how = f"{layer} was solved with damping {retry.damping:g}"
    else:
        how = f"{layer} was not solved: {solver}, without an update of the weights that stay"
    return f"{how} ({failures})" if failures else how


def interval(ratio: Interval) -> str:
    """Format a ratio with its confidence interval."""
    return f"{ratio.estimate:.2f}x ({ratio.low:.2f}x to {ratio.high:.2f}x)"


def _gaps(model: ModelReport) -> Iterator[Gap]:
    for stage, (what, command) in _STAGES.items():
        if stage not in model.seconds:
            yield Gap(what, "not measured", command)
    yield from _gaps_of_targets(model)
    runs = [run for run in model.bench if run.status != "INTERRUPTED"]
    if all(run.on_cpu for run in runs):
        yield Gap("latency and memory on a GPU", NOT_MEASURED, None)
    kinds = {scenario.kind for run in runs for scenario in run.scenarios}
    for kind, what in (("generate", "whole answers"), ("open-loop", "requests that arrive freely")):
        if runs and kind not in kinds:
            yield Gap(f"latency of {what}", "not measured", _STAGES[layout.BENCH][1])
    command = _STAGES[layout.EVAL][1]
    if model.quality and model.export and not model.graph_quality:
        what = f"perplexity of the {model.export.dtype} graph itself"
        why = "the perplexity is the checkpoint's, in PyTorch"
        yield Gap(what, why, f"{command} --runtime onnx")
    if not model.tasks:
        tasks = "quality on tasks: knowledge, reasoning, instructions"
        asked = "perplexity and questions about the text" if model.answers else "perplexity"
        why = f"{asked} only; judge the model on your own task"
        yield Gap(tasks, why, f"{command} --tasks NAME,...")


def _gaps_of_targets(model: ModelReport) -> Iterator[Gap]:
    """Yield what the targets that were not exported would measure.

    Targets that measure the same thing share one gap.
    """
    known = {
        target.missing.what
        for stage in model.seconds
        if (target := targets.of_stage(stage)) is not None
        if target.missing is not None and target.asked_for(stage)
    }
    # The gap names the first such target, so targets that need no GPU come first.
    for target in sorted(targets.every(), key=lambda target: target.gpu):
        missing = target.missing
        if missing is not None and missing.what not in known and _takes(target, model):
            known.add(missing.what)
            command = f"thanos-deploy export OUT --target {target.name}"
            yield Gap(missing.what, missing.why, command)


def _takes(target: Target[Any, Any], model: ModelReport) -> bool:
    """Whether a target takes the model, judged by the pattern that holds in its layers."""
    holds = bool(model.linear_layers.pattern_holds)
    try:
        target.refuse([parse(model.pattern)] if holds else [])
    except UsageError:
        return False
    return True


def _of_quality(quality: Quality | None) -> Iterator[str]:
    if quality:
        yield f"Perplexity went from {quality.dense:.2f} to {quality.pruned:.2f}."


def _of_fidelity(near: Fidelity | None) -> Iterator[str]:
    if near:
        if near.divergence is not None:
            yield (
                "Its predictions of the next token diverge from the dense model's by "
                f"{near.divergence:.3f} nats per token of the text."
            )
        yield (
            f"At {near.agreement:.0%} of the positions of the text both models find the "
            f"same token most likely. In {near.texts} texts of {near.tokens} tokens that "
            "the dense model generates greedily, the pruned model would generate "
            f"{near.continued:.0f} of the tokens after reading those before them, and "
            f"{near.before_first:.0f} before its first different token, on average."
        )


def _of_answers(asked: AnsweredQuestions) -> str:
    dense, pruned, change = (
        f"{one.estimate * 100:{sign}.1f} ({one.low * 100:{sign}.1f} to {one.high * 100:{sign}.1f})"
        for one, sign in ((asked.dense, ""), (asked.pruned, ""), (asked.change, "+"))
    )
    return (
        f"Of {asked.questions} questions about the text ({asked.kind}), the dense model answers "
        f"{dense} percent right and the pruned one {pruned}: {change} points."
    )


def _of_graph(
    quality: Quality | None, graph: Quality | None, export: ExportSummary | None
) -> Iterator[str]:
    """Compare the perplexity of the exported graph with that of the checkpoint."""
    if quality and graph and export and quality.measured_on == graph.measured_on:
        yield (
            f"The exported {export.dtype} graph itself, run by ONNX Runtime on the same text, "
            f"has {graph.pruned:.2f} ({graph.pruned / quality.pruned - 1.0:+.2%})."
        )


def _of_times(run: Run | None) -> Iterator[str]:
    times = [f"{name} took {interval(ratio)}" for name, ratio in quoted_times(run)]
    if run is None or not times:
        return
    yield (
        f"Measured with {run.backend}, {run.provider}, on "
        f"{run.processor}: {'; '.join(times)} the dense model's time."
    )
    if run.status != "VALID":
        yield (
            f"That run is {run.status} ({'; '.join(run.reasons)}): repeat it before its "
            "times are used."
        )


def _of_own_gpu(model: ModelReport, *, quoted: Run | None = None) -> Iterator[str]:
    """Describe the model's own benchmark run on a GPU, unless it is `quoted` already."""
    run = quoted_on_gpu(model)
    if run is not None and (quoted is None or run.run != quoted.run):
        yield from _of_times(run)


def _of_gpus(model: ModelReport) -> Iterator[str]:
    """Yield the published figures of the model's pattern on GPUs.

    Figures of the GPU on which this model was timed come first.
    """
    pattern, own = parse(model.pattern), quoted_on_gpu(model)
    if not _gpus_matter(model):
        return
    here = [*gpu_figures.sentences(pattern, card=own.processor)] if own else []
    elsewhere = [one for one in gpu_figures.sentences(pattern) if one not in here]
    yield from here + elsewhere
    if not (own or elsewhere):
        yield f"On a GPU: {NOT_MEASURED}."


def _gpus_matter(model: ModelReport) -> bool:
    """Whether a GPU can profit: 2:4 holds everywhere, or heads, channels or blocks were cut."""
    match parse(model.pattern):
        case SemiStructured(2, 4):
            return bool(model.linear_layers.pattern_holds)
        case Structured():
            return model.widths is not None and not model.widths.drops_experts
    return False


def _of_cuts(widths: CutWidths) -> Iterator[str]:
    """Explain the effect of cutting out blocks, experts, or heads and channels."""
    if widths.dropped:
        count = len(widths.dropped)
        yield (
            f"{count} {'block was' if count == 1 else 'blocks were'} dropped, with "
            f"{widths.removed:.1%} of the blocks' parameters ({ranges(widths.dropped)}): the "
            "files, the memory and the work of the blocks shrink by that fraction, and a token "
            "passes fewer kernels, on any machine and backend; embeddings and the output head are "
            "unchanged."
        )
    elif widths.drops_experts:
        yield (
            f"{widths.removed:.1%} of the blocks' parameters were cut out, as whole experts: the "
            "files and the memory shrink by that fraction. A token is still sent to as many "
            "experts as before, so that only what computes all of them, as the ONNX graph does, "
            "has less work."
        )
    else:
        yield (
            f"{widths.removed:.1%} of the blocks' parameters were cut out: the files, the "
            "memory and the work of every block shrink by that fraction, on any machine and "
            "backend; embeddings and the output head are unchanged."
        )
    if widths.stock_config:
        yield "The result is an ordinary smaller checkpoint: stock loaders take it as it is."
    else:
        yield (
            "No stock config.json describes these widths, so model/ is for thanos-deploy only "
            "(widths.json declares them); the ONNX graph runs anywhere."
        )


def _of_zeros(model: ModelReport) -> Iterator[str]:
    """Explain the effect of zeros in matrices that keep the shapes of the dense model."""
    pattern = parse(model.pattern)
    found = model.linear_layers.patterns or {}
    if len(found) > 1:
        said = ", ".join(f"{its} in {count}" for its, count in found.items())
        yield f"The linear layers differ: {said}."
    if isinstance(pattern, Structured):
        yield (
            "The removed columns are zero, but the matrices keep their shapes (--keep-shape), so "
            "nothing is faster or smaller: that needs heads and channels to be cut out."
        )
        return
    yield (
        f"{pattern} brings no speed on a CPU: ONNX Runtime has no sparse CPU kernels, so it reads "
        "and multiplies the zeros like any other number; a difference from 1.00x has other causes."
    )
    yield "The files are no smaller either, because the zeros are stored like any other number."
    match pattern:
        case SemiStructured() if not model.linear_layers.pattern_holds:
            yield (
                "The pattern does not hold in every row (outlier rows were left dense), so sparse "
                "tensor cores do not take these layers as they are."
            )
        case SemiStructured(2, 4):
            yield (
                "What would be faster: sparse tensor cores (NVIDIA, compute capability 8.0 or "
                "later) through TensorRT with sparse weights allowed, for prefill and large "
                "batches; on any machine, structured pruning, which makes the matrices smaller."
            )
        case _:
            yield (
                f"No sparse tensor core takes {pattern} (they take 2:4 only), so a GPU does not "
                "change this; structured pruning, which makes the matrices smaller, would."
            )


def _of_sizes(sizes: FileBytes) -> Iterator[str]:
    """Yield each exported target's sentence about its size relative to the dense model."""
    for target in targets.every():
        size = sizes.targets.get(target.name)
        if size and size.dense and target.size is not None and target.size.sentence:
            yield target.size.sentence.format(ratio=size.pruned / size.dense)


def _outcome(ratio: Interval) -> str:
    """Say whether a confidence interval of a time ratio shows a difference."""
    if ratio.high < 1.0 or ratio.low > 1.0:
        return f"takes {interval(ratio)} the time"
    return f"shows no difference ({ratio.low:.2f}x to {ratio.high:.2f}x the time)"
