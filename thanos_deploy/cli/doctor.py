"""`thanos-deploy doctor`: what this machine has for each target."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import common_options, emit, session
from thanos_deploy.errors import PlatformError


@click.command("doctor")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@common_options
def command(out: Path | None, **options: Any) -> None:
    """Say what this machine has for each target, and what to do about what it lacks.

    With a bundle OUT: also whether there is enough memory and disk to build its engine.

    Exit code 4 if something that is there would fail; what is not there is not an error.
    """
    with session(options):
        from exporters import preflight
        from thanos_deploy import check
        from thanos_deploy.bundle.manifest import Bundle
        from thanos_deploy.cli._tables import show_checks

        size = None
        if out is not None:
            graph = Bundle.open(out).require("onnx", f"`thanos-deploy export {out}`")
            size = sum(file.bytes for file in graph.files.values())
        checks = preflight.checks(graph_bytes=size, folder=out)
    emit(
        options,
        {"checks": checks},
        lambda _: show_checks(checks),
    )
    if not check.passed(checks):
        failed = next(entry for entry in checks if entry.outcome == "FAIL")
        raise PlatformError(f"{failed.name}: {failed.detail}", fix=failed.fix)
