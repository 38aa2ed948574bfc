"""`thanos-deploy export`: the pruned model of a bundle, for one target."""

from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from exporters import targets
from thanos_deploy.cli._options import (
    bundle_argument,
    common_options,
    emit,
    given,
    session,
    told,
)
from thanos_deploy.cli._targets import summaries, target_options

_HELP = f"""Export the pruned model of the bundle OUT.

\b
{summaries()}

Nothing but OUT is needed, so that it can be copied to the machine with the GPU and finished there.
"""


@click.command("export", help=_HELP)
@bundle_argument
@target_options()
@common_options
def command(out: Path, target: str, **options: Any) -> None:
    """Export the pruned model of the bundle OUT; see `_HELP`."""
    with session(options) as announce:
        from thanos_deploy.cli._tables import show_table, show_values

        record = td.Bundle(out).export(target, **given(options), progress=told(announce))
    show = targets.get(target).show
    if show is None:
        emit(options, record.result, show_values)
    else:
        emit(options, record.result, lambda result: show_table(show(result)))
