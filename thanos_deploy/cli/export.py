"""`thanos-deploy export`: the pruned model of a bundle, for one target."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy import console
from thanos_deploy.cli._options import (
    bundle_argument,
    common_options,
    emit,
    session,
    target_option,
)


@click.command("export")
@bundle_argument
@target_option
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="What the graph holds its weights in; int8: those of the blocks, for ONNX Runtime only.  "
    "[default: what it was made with, or fp32]",
)
@click.option(
    "--max-seq",
    type=int,
    help="The most tokens, prompt and answer together, that are promised to work.  "
    "[default: what it was made with, or all that the model takes]",
)
@common_options
def command(out: Path, target: str, dtype: str | None, max_seq: int | None, **options: Any) -> None:
    """Export the pruned model of the bundle OUT.

    \b
    onnx    one graph for prefill and decode, compared with PyTorch: OUT/onnx
    genai   that graph as a folder that ORT-GenAI loads: OUT/genai
    packed  the checkpoint with n:m weights stored without their zeros: OUT/packed
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from thanos_deploy import artifact, pipeline
        from thanos_deploy.requests import ExportRequest

        with artifact.claim(out, artifact.Bundle.open(out).source) as bundle:
            before = pipeline.exported_with(bundle)
            request = ExportRequest(
                dtype=dtype or before.dtype,
                max_sequence=before.max_sequence if max_seq is None else max_seq,
            )
            record = pipeline.export(
                bundle,
                target=target,
                request=request,
                overwrite=options["overwrite"],
                announce=announce,
            )
    emit(
        options,
        record.result,
        console.show_parity if target == "onnx" else console.show_values,
    )
