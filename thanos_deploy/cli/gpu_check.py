"""`thanos-deploy gpu-check`: test this project's claims about GPUs on this GPU."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import common_options, emit, session

_FILE = "gpu-check.json"


@click.command("gpu-check")
@click.option(
    "--bundle",
    "out",
    type=click.Path(path_type=Path),
    help="A bundle pruned to 2:4 and exported to ONNX, for the steps that need one.",
)
@click.option(
    "--only", metavar="STEP,...", default="", help="Run only these steps or groups of steps."
)
@click.option("--skip", metavar="STEP,...", default="", help="Do not run these steps or groups.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Time limit for all steps together; a step that needs more than the time left is "
    "skipped and listed.  [default: 1200]",
)
@click.option(
    "-o",
    "--out",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Where to write the figures.  [default: {_FILE} in the bundle, or in the current folder]",
)
@common_options
def command(
    out: Path | None,
    only: str,
    skip: str,
    seconds: float | None,
    file: Path | None,
    **options: Any,
) -> None:
    """Check on this GPU whether kernels and engines compute correctly, and how fast they are.

    Packages, drivers and GPUs are checked first. Then these steps run, each in a process of its
    own: card, peaks, correctness, gemm, model, pruning, walk and tensorrt-models, which need no
    bundle, and ort-cuda, tensorrt and ort-tensorrt, which do. A table shows PASS, FAIL or SKIP and
    the reason for each step. The figures are written as JSON row by row, so a step that fails keeps
    what it has measured.

    Exit codes: 4 nothing could run, 6 something failed.
    """
    with session(options) as announce, ExitStack() as held:
        from thanos_deploy import gpu_check
        from thanos_deploy.bundle import manifest
        from thanos_deploy.cli._tables import show_checks
        from thanos_deploy.gpu import records as gpu_records
        from thanos_deploy.gpu_check import steps

        todo = steps.choose(gpu_check.STEPS, only=_names(only), skip=_names(skip))
        if out is not None:
            bundle = held.enter_context(manifest.claim(out, manifest.Bundle.open(out).source))
            bundle.require("onnx", f"`thanos-deploy export {out}`")
        file = file or (out or Path()) / _FILE
        journal = file.with_suffix(".jsonl")
        records = gpu_check.run(
            todo,
            journal,
            bundle=out,
            seconds=seconds or gpu_check.SECONDS,
            log=file.with_suffix(".log"),
            announce=announce,
        )
        gpu_records.write(file, records)
        journal.unlink(missing_ok=True)
        checks = gpu_check.lines(records)
    emit(
        options,
        {"status": records.status, "checks": checks},
        lambda _: show_checks(checks),
    )
    gpu_check.require_passed(records)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
