"""`thanos-deploy export`: export the pruned model of a bundle for one target."""

import os
from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from exporters import targets
from thanos_deploy.bundle.codec import encode
from thanos_deploy.cli._options import (
    common_options,
    emit,
    given,
    progress_callback,
    revision_option,
    session,
)
from thanos_deploy.cli._targets import summaries, target_options

_HELP = f"""Export the pruned model of the bundle OUT.

\b
{summaries()}

The command reads only OUT, so the folder can be copied to the machine with the GPU and exported
there.

With --to, OUT is a model without a bundle that is already sparse. Targets that take --to:
{", ".join(each.name for each in targets.every() if each.convert is not None)}.
"""


@click.command("export", help=_HELP)
@click.argument("model", metavar="OUT", type=click.Path(path_type=Path))
@target_options()
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Treat OUT as a model without a bundle, and write the export to this new folder.",
)
@revision_option
@common_options
def command(
    model: Path, target: str, to: Path | None, revision: str | None, **options: Any
) -> None:
    """Export the pruned model of the bundle OUT; see `_HELP`."""
    asked = given(options)
    with session(options) as announce:
        from thanos_deploy.cli._tables import show_table, show_values

        if to is not None:
            if asked.pop("overwrite") or asked:
                raise td.UsageError(
                    "--to with options that apply only to the export of a bundle",
                    fix="give no other options than --target, --to and --revision",
                )
            written = td.export(
                os.fspath(model),
                target,
                to=to,
                revision=revision,
                progress=progress_callback(announce),
            )
            emit(options, encode(written), show_values)
            return
        if revision is not None:
            raise td.UsageError(
                "--revision without --to: the model of a bundle is not read from the hub",
                fix="leave --revision out",
            )
        exported = td.Bundle(model).export(target, **asked, progress=progress_callback(announce))
    show = targets.get(target).show
    if show is None:
        emit(options, encode(exported.result), show_values)
    else:
        emit(options, encode(exported.result), lambda _: show_table(show(exported.result)))
