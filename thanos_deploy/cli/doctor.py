"""`thanos-deploy doctor`: check whether this machine has what each target needs."""

from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import common_options, emit, session


@click.command("doctor")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@common_options
def command(out: Path | None, **options: Any) -> None:
    """Check what this machine has for each target, and say how to get what is missing.

    With a bundle OUT, also check that there is enough memory and disk to build its engine.

    The exit code is 4 if something that is installed would fail. A missing package or GPU is only
    reported.
    """
    with session(options):
        from thanos_deploy.cli._tables import show_checks

        found = td.doctor(out, check=False)
    emit(options, found, lambda value: show_checks(value.checks))
    found.require()
