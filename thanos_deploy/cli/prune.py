"""`thanos-deploy prune`: a checkpoint in, a sparse or smaller one out."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import (
    common_options,
    dry_run_option,
    emit,
    model_argument,
    out_option,
    revision_option,
    session,
)
from thanos_deploy.cli._pruning import prune_request, pruning_options


@click.command("prune")
@model_argument
@out_option
@pruning_options
@revision_option
@dry_run_option
@common_options
def command(model: str, out: Path, revision: str | None, dry_run: bool, **options: Any) -> None:
    """Prune MODEL into OUT/model, an ordinary checkpoint.

    --dry-run works for a moment and prints an estimate of the time, memory and disk that pruning
    takes. With a structured pattern it first measures what each block would lose and prints the
    heads and channels that would stay.
    """
    with session(options) as announce:
        from thanos_deploy.bundle import manifest
        from thanos_deploy.cli._tables import show_plan, show_pruned
        from thanos_deploy.pruning.result import PRUNE
        from thanos_deploy.stages.dense import Dense
        from thanos_deploy.stages.plan import plan_prune
        from thanos_deploy.stages.prune import prune

        request = prune_request(options)
        if dry_run:
            plan = plan_prune(model, out, request, revision=revision, announce=announce)
            emit(options, plan, show_plan)
            return
        dense = Dense(model, revision=revision)
        with manifest.claim(out, dense.source, overwrite=options["overwrite"]) as bundle:
            prune(
                bundle,
                dense,
                request,
                overwrite=options["overwrite"],
                announce=announce,
            )
            result = bundle.result(PRUNE)
    emit(options, result, show_pruned)
