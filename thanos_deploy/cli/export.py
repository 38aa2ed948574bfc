"""`thanos-deploy export`: the pruned model of a bundle, for one target."""

from pathlib import Path
from typing import Any

import click

from exporters import targets
from thanos_deploy.cli._options import bundle_argument, common_options, emit, session
from thanos_deploy.cli._targets import asked, summaries, target_options

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
        from thanos_deploy.bundle import manifest
        from thanos_deploy.cli._tables import show_table, show_values
        from thanos_deploy.stages.export import export

        chosen = targets.get(target)
        with manifest.claim(out, manifest.Bundle.open(out).source) as bundle:
            record = export(
                bundle,
                target=target,
                request=chosen.request(bundle, asked(options)),
                overwrite=options["overwrite"],
                announce=announce,
            )
    if chosen.show is None:
        emit(options, record.result, show_values)
    else:
        show = chosen.show
        emit(options, record.result, lambda result: show_table(show(result)))
