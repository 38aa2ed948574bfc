"""`thanos-deploy prune-export`: every stage, from a dense model to its report."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli import _progress
from thanos_deploy.cli._options import (
    bench_request,
    benchmark_options,
    common_options,
    dry_run_option,
    emit,
    eval_request,
    evaluation_options,
    model_argument,
    out_option,
    revision_option,
    session,
)
from thanos_deploy.cli._pruning import prune_request, pruning_options
from thanos_deploy.cli._targets import asked, target_options


@click.command("prune-export")
@model_argument
@out_option
@pruning_options
@target_options(leave_out=("dtype", "batch"))  # of the checkpoint, and of what is timed
@evaluation_options()
@benchmark_options
@revision_option
@dry_run_option
@common_options
def command(
    model: str,
    out: Path,
    target: str,
    revision: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Prune MODEL, export it, run it, measure it, and say what came out.

    \b
    thanos-deploy prune-export SmolLM2.gguf --pattern 2:4 --target onnx -o out/smol
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from exporters import preflight, targets
        from thanos_deploy.cli._tables import show_plan, show_report
        from thanos_deploy.stages import pipeline

        chosen = targets.get(target)
        if chosen.gpu and not dry_run:
            for check in preflight.of_target(chosen):
                if check.outcome != "PASS":
                    # Said before minutes of work; the engine is the last of it.
                    _progress.show_note(
                        f"{check.name}: {check.detail}; every stage before the engine is finished "
                        "all the same"
                    )
        # A plan is the same for every target.
        requests: dict[str, Any] = {
            "request": prune_request(options),
            "evaluation": eval_request(options),
            "benchmarking": bench_request(options),
            "revision": revision,
            "overwrite": options["overwrite"],
            "announce": announce,
        }
        if dry_run:
            emit(options, pipeline.plan(model, out, **requests), show_plan)
            return
        report = pipeline.prune_export(model, out, target=target, asked=asked(options), **requests)
    emit(options, report, show_report)
