"""`thanos-deploy export`: the pruned model of a bundle, for one target."""

from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import (
    bundle_argument,
    common_options,
    emit,
    engine_options,
    engine_request,
    session,
    target_option,
)
from thanos_deploy.cli._types import CountsType
from thanos_deploy.errors import UsageError


@click.command("export")
@bundle_argument
@target_option
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8", "int8-qdq"]),
    help="What the graph holds its weights in; int8: those of the blocks, for ONNX Runtime only; "
    "int8-qdq: weights and activations of the blocks, for engines only.  [default: what it was "
    "made with, or fp32; engines: fp16]",
)
@click.option(
    "--max-seq",
    type=int,
    help="The most tokens, prompt and answer together, that are promised to work.  "
    "[default: what it was made with, or all that the model takes]",
)
@click.option(
    "--logits",
    type=click.Choice(["all", "last"]),
    help="last: the graph computes them after the last token only, which is less work for a prompt "
    "and all that generating text needs; all: after every token, which `eval --runtime onnx` needs "
    "too.  [default: what it was made with, or all; engines: last]",
)
@click.option(
    "--batch",
    type=CountsType(),
    help="Engines: sequences at once, the usual number and the largest.  [default: 1,8]",
)
@click.option(
    "--seq",
    type=CountsType(),
    help="Engines: tokens of a prompt, the usual number and the largest.  [default: 128,1024, or "
    "as far as the model goes]",
)
@engine_options
@common_options
def command(
    out: Path,
    target: str,
    dtype: str | None,
    max_seq: int | None,
    logits: str | None,
    batch: tuple[int, ...] | None,
    seq: tuple[int, ...] | None,
    **options: Any,
) -> None:
    """Export the pruned model of the bundle OUT.

    \b
    onnx          one graph for prefill and decode, compared with PyTorch: OUT/onnx
    genai         that graph as a folder that ORT-GenAI loads: OUT/genai
    packed        the checkpoint with n:m weights stored without their zeros: OUT/packed
    triton        the graph, the engines and a text model for Triton, and KServe: OUT/triton
    tensorrt      an engine for the GPU of this machine: OUT/engines/tensorrt-...
    tensorrt-rtx  an engine for the GPUs of --sm, built on any machine: OUT/engines/tensorrt-rtx-...

    Nothing but OUT is needed, so that it can be copied to the machine with the GPU and finished
    there.
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from exporters.options import ExportRequest
        from thanos_deploy.bundle import manifest
        from thanos_deploy.cli import _tables
        from thanos_deploy.stages.export import ENGINES, export, exported_with

        unfit = "int8" if target in ENGINES else "int8-qdq"
        if dtype == unfit:
            raise UsageError(
                f"--dtype {dtype} with --target {target}",
                fix="int8 is for onnx and genai, int8-qdq for tensorrt and tensorrt-rtx",
            )
        with manifest.claim(out, manifest.Bundle.open(out).source) as bundle:
            before = exported_with(bundle)
            record = export(
                bundle,
                target=target,
                request=ExportRequest(
                    dtype=dtype or before.dtype,
                    max_sequence=before.max_sequence if max_seq is None else max_seq,
                    logits=logits or before.logits,
                ),
                engine=engine_request(
                    options,
                    dtype=dtype,
                    max_sequence=max_seq,
                    logits=logits,
                    batch=batch,
                    prompt=seq,
                ),
                overwrite=options["overwrite"],
                announce=announce,
            )
    shows = {"onnx": _tables.show_parity, **dict.fromkeys(ENGINES, _tables.show_engine)}
    emit(options, record.result, shows.get(target, _tables.show_values))
