"""The stages of a bundle, from a dense model to a report; each is done once and kept.

    import   a GGUF file or a packed folder is unpacked       (in the cache)
    prune    model/, layers.json
    eval     eval/perplexity.json
    eval-onnx, eval-tasks, eval-tasks-onnx    eval/            (only if asked for)
    onnx     onnx/                                            (of the dense model: in the cache)
    and for another target its own stage; see `exporters.targets`    (only if asked for)
    bench    bench/RUN.json for every run, bench/sample.json
    report   report/{index.html,report.md,report.json}, README.md

Each is a file of `thanos_deploy.stages`; here they are in a row.
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
from thanos_deploy.ranks.start import together
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
    """Every stage, from a dense model to its report. Repeating the call continues or confirms it.

    Where there are several ranks, they prune together, and the first one does the rest; the others
    have no report.

    Args:
        model, revision: the dense model; see `Dense`.
        out: the folder of the bundle.
        request: how to prune.
        evaluation: what to measure the quality on.
        benchmarking: what to time.
        target: what to export to beside ONNX, which is what is timed.
        asked: by name of one of the target's options, what differs from its defaults; see
            `exporters.target.Target.request`.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.

    Raises:
        DeployError: of any kind; whatever can be refused before the work begins is refused then.
    """
    chosen = targets.get(target)
    chosen.refuse([request.how.pattern])
    if not chosen.gpu:  # else the export may be finished where the GPU is
        preflight.require(chosen)
    with together() as ranks, ExitStack() as stack:
        dense = Dense(model, revision=revision)
        if not ranks.first:
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
                lacking = error  # the rest does not need this export, and is not to be lost
        subjects = compared(bundle, [DENSE], dense, announce=announce)
        bench(bundle, subjects, benchmarking, overwrite=overwrite, announce=announce)
        finished = write_report(bundle)
        if lacking is not None:
            raise lacking
        return finished


def _exports(
    bundle: Bundle, target: Target[Any, Any], asked: Mapping[str, object]
) -> dict[str, object]:
    """By name of a target, its options: of the graph, which is timed in any case, and of another.

    Raises:
        UsageError: the target does not take what was asked for.
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
    """What `prune_export` would do, and whether it would be refused; writes nothing to `out`."""
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
    """Raise now what a later stage would raise after minutes of work."""
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
