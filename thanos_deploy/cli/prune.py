"""`thanos-deploy prune`: make a sparse or smaller checkpoint from a checkpoint."""

from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import (
    common_options,
    dry_run_option,
    emit,
    given,
    model_argument,
    out_option,
    progress_callback,
    revision_option,
    session,
)
from thanos_deploy.cli._processes import may_print, processes_option
from thanos_deploy.cli._pruning import pruning_options


@click.command("prune")
@model_argument
@out_option
@pruning_options
@revision_option
@processes_option
@dry_run_option
@common_options
def command(model: str, dry_run: bool, overwrite: bool, **options: Any) -> None:
    """Prune MODEL into OUT/model, an ordinary checkpoint.

    --dry-run measures for a moment and prints an estimate of the time, memory and disk that pruning
    takes. With a structured pattern it first measures what each block would lose, and also prints
    the heads and channels that would stay.
    """
    with session(options) as announce:
        from thanos_deploy.cli._pruning_tables import show_plan, show_pruned

        asked: dict[str, Any] = {**given(options), "progress": progress_callback(announce)}
        if dry_run:
            emit(options, td.dry_run_prune(model, **asked), show_plan)
            return
        bundle = td.prune(model, overwrite=overwrite, **asked)
    if may_print():
        emit(options, bundle.pruned, show_pruned)
