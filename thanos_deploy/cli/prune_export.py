"""`thanos-deploy prune-export`: run every stage, from a dense model to its report."""

from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.bundle.codec import loads
from thanos_deploy.cli import _progress
from thanos_deploy.cli._options import (
    benchmark_options,
    common_options,
    dry_run_option,
    emit,
    evaluation_options,
    given,
    model_argument,
    out_option,
    progress_callback,
    revision_option,
    session,
)
from thanos_deploy.cli._processes import may_print, processes_option
from thanos_deploy.cli._pruning import pruning_options
from thanos_deploy.cli._targets import target_options


@click.command("prune-export")
@model_argument
@out_option
@pruning_options
@target_options(leave_out=("dtype", "batch"))  # here --dtype is the checkpoint's, --batch bench's
@evaluation_options()
@benchmark_options
@revision_option
@processes_option
@dry_run_option
@common_options
def command(model: str, target: str, dry_run: bool, **options: Any) -> None:
    """Prune MODEL, export it, run it, measure it, and write a report.

    \b
    thanos-deploy prune-export SmolLM2.gguf --pattern 2:4 --target onnx -o out/smol
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from exporters import preflight, targets
        from thanos_deploy.bundle import layout
        from thanos_deploy.bundle.codec import decode
        from thanos_deploy.cli._pruning_tables import show_plan
        from thanos_deploy.cli._tables import show_report
        from thanos_deploy.report.model import Report

        chosen = targets.get(target)
        if chosen.gpu and not dry_run:
            for check in preflight.of_target(chosen):
                if check.outcome != "PASS":
                    # Printed before minutes of work, because the engine is built last.
                    _progress.show_note(
                        f"{check.name}: {check.detail}; all stages before the engine are still run"
                    )
        asked: dict[str, Any] = {
            **given(options),
            "target": target,
            "progress": progress_callback(announce),
        }
        if dry_run:
            emit(options, td.dry_run_prune_export(model, **asked), show_plan)
            return
        bundle = td.prune_export(model, **asked)
        if not may_print():
            return
        report = loads((bundle.path / layout.REPORT_RECORD).read_bytes())
    emit(options, decode(Report, report), show_report)
