"""`thanos-deploy eval`: perplexity, dense and pruned."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy import console
from thanos_deploy.cli._options import (
    bundle_argument,
    common_options,
    dense_option,
    emit,
    eval_request,
    evaluation_options,
    session,
    text_field_option,
)


@click.command("eval")
@bundle_argument
@dense_option
@text_field_option
@evaluation_options
@common_options
def command(out: Path, dense: str, **options: Any) -> None:
    """Measure the perplexity of the bundle OUT and of the dense model.

    A bundle holds one evaluation; --overwrite replaces it by one on another text.
    """
    with session(options) as announce:
        from thanos_deploy import pipeline
        from thanos_deploy.report.write import write_report

        with pipeline.reopen(out, dense) as (bundle, source):
            pruned = pipeline.evaluate(
                bundle,
                source,
                eval_request(options),
                overwrite=options["overwrite"],
                announce=announce,
            )
            if "report" in bundle.stages:
                write_report(bundle)
    emit(options, {"dense": pruned.inputs["dense"], "pruned": pruned.result}, console.show_values)
