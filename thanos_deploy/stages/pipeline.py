"""The pipeline from a dense model to a report. Each stage is done once, and its files are kept.

    import   a GGUF file or a packed folder is unpacked       (in the cache)
    prune    model/, layers.json
    eval     eval/perplexity.json
    eval-onnx, eval-tasks, eval-tasks-onnx    eval/            (only by other commands)
    onnx     onnx/                                            (of the dense model: in the cache)
    and for another target its own stage; see `exporters.targets`    (only if asked for)
    bench    bench/RUN.json for every run, bench/sample.json
    report   report/{index.html,report.md,report.json}, README.md

Most stages have a file of their own in `thanos_deploy.stages`; this file runs them in order.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters import preflight, targets
from exporters.target import Target
from thanos_deploy.bundle import manifest
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import PlatformError
from thanos_deploy.measure.options import BenchRequest, EvalRequest
from thanos_deploy.measure.quality import EVAL
from thanos_deploy.measure.run import DENSE, PRUNED
from thanos_deploy.model.locate import LocatedModel
from thanos_deploy.model.pretrained import require_no_adapter
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.ranks.start import connected
from thanos_deploy.report.model import Report
from thanos_deploy.report.write import write_report
from thanos_deploy.stages.bench import bench, check_bench, compared
from thanos_deploy.stages.checkpoints import check
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.evaluate import evaluate
from thanos_deploy.stages.export import export
from thanos_deploy.stages.plan import DryRun, plan_pruning
from thanos_deploy.stages.prune import follow, prune
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import calibration, open_text, require_other_text, segments_for

STAGES = ("prune", "eval", ONNX, "bench", "report")


def prune_export(
    model: str | LocatedModel,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    target: str = ONNX,
    asked: Mapping[str, object] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Report | None:
    """Run all stages, from a dense model to its report.

    Repeating the call continues an interrupted run, or confirms the finished stages. With several
    ranks, all of them prune together, and rank 0 runs the other stages.

    Args:
        model, revision: the dense model; see `Dense`.
        out: the folder of the bundle.
        request: how to prune.
        evaluation: what to measure the quality on.
        benchmarking: what to time.
        target: target to export to in addition to ONNX. Only the ONNX graph is timed.
        asked: options of the target that differ from their defaults, by field name; see
            `exporters.target.Target.request`.
        overwrite: redo stages that were made with other options.
        announce: told of each task.

    Returns:
        the report; None on ranks other than 0.

    Raises:
        DeployError: any kind. Errors that can be found beforehand are raised before any work.
    """
    chosen = targets.get(target)
    chosen.refuse([request.how.pattern])
    if not chosen.gpu:  # the export to a GPU target may be finished on another machine
        preflight.require(chosen)
    with connected() as ranks, ExitStack() as stack:
        dense = Dense(model, revision=revision)
        if not ranks.is_first:
            follow(dense, request)
            return None
        bundle = stack.enter_context(manifest.claim(out, dense.source, overwrite=overwrite))
        _refuse_beforehand(bundle, dense, request, evaluation, benchmarking, overwrite, announce)
        wanted = _exports(bundle, chosen, asked or {})
        prune(bundle, dense, request, overwrite=overwrite, announce=announce)
        evaluate(bundle, dense, evaluation, overwrite=overwrite, announce=announce)
        lacking: PlatformError | None = None
        for name, options in wanted.items():
            try:
                export(bundle, target=name, request=options, overwrite=overwrite, announce=announce)
            except PlatformError as error:
                if name == ONNX:
                    raise
                lacking = error  # the later stages do not need this export: raise it after them
        subjects = compared(bundle, [DENSE], dense, announce=announce)
        bench(bundle, subjects, benchmarking, overwrite=overwrite, announce=announce)
        finished = write_report(bundle)
        if lacking is not None:
            raise lacking
        return finished


def _exports(
    bundle: Bundle, target: Target[Any, Any], asked: Mapping[str, object]
) -> dict[str, object]:
    """Return the export options by target: for ONNX, whose graph is always timed, and `target`.

    Raises:
        UsageError: the target does not take one of the options.
    """
    graph = targets.get(ONNX)
    of_graph = asked if target.options is graph.options else {}
    return {ONNX: graph.request(bundle, of_graph), target.name: target.request(bundle, asked)}


def plan(
    model: str | LocatedModel,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> DryRun:
    """Plan `prune_export`, and refuse what it would refuse; nothing is written to `out`."""
    dense = Dense(model, revision=revision)
    bundle = Bundle.open(out) if (out / manifest.MANIFEST).exists() else Bundle(out, dense.source)
    _refuse_beforehand(bundle, dense, request, evaluation, benchmarking, overwrite, announce)
    parameters = dense.checkpoint(announce).parameters
    return replace(
        plan_pruning(dense, request, out, announce, evaluation),
        eval=evaluation.recorded,
        bench=benchmarking,
        stages={name: "done" if name in bundle.stages else "to do" for name in STAGES},
        cache=str(dense.folder),
        cache_bytes_needed=(4 if dense.is_ordinary else 8) * parameters,
    )


def _refuse_beforehand(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    overwrite: bool,
    announce: Announce,
) -> None:
    """Raise errors now that a later stage would raise after minutes of work."""
    bundle.check(PRUNE, request.to_json(), overwrite=overwrite)
    bundle.check(EVAL, evaluation.recorded, overwrite=overwrite)
    check_bench(bundle, benchmarking, [DENSE, PRUNED], overwrite=overwrite)
    source = dense.checkpoint(announce)
    require_no_adapter(source.folder)
    check(source, request)
    benchmarking.check(source.max_positions)
    seen = calibration(source, request.data).text
    text = open_text(evaluation.text, evaluation.text_field, held_out=True, source=source)
    segments_for(source, text, evaluation.segments, evaluation.seqlen, seed=None)
    require_other_text(text, seen.sha256)
