"""`thanos-deploy bench`: latency and memory, dense beside pruned."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy import console
from thanos_deploy.cli._options import (
    bench_request,
    benchmark_options,
    bundle_argument,
    common_options,
    dense_option,
    emit,
    session,
)


@click.command("bench")
@bundle_argument
@dense_option
@benchmark_options
@common_options
def command(out: Path, dense: str, **options: Any) -> None:
    """Time the bundle OUT beside the dense model, and bring its report up to date."""
    with session(options) as announce:
        from thanos_deploy import pipeline
        from thanos_deploy.report.write import write_report

        with pipeline.reopen(out, dense) as (bundle, source):
            bundle.require("eval", f"`thanos-deploy eval {out} --dense {dense}`")
            pipeline.bench(
                bundle,
                source,
                bench_request(options),
                overwrite=options["overwrite"],
                announce=announce,
            )
            report = write_report(bundle)
    emit(options, report, console.show_report)
