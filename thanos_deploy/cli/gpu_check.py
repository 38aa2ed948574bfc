"""`thanos-deploy gpu-check`: does what is said of GPUs hold on this one?"""

from pathlib import Path
from typing import Any

import click

from thanos_deploy import console
from thanos_deploy.cli._options import common_options, emit, session
from thanos_deploy.errors import GateError

_FILE = "gpu-check.json"


@click.command("gpu-check")
@click.option(
    "--bundle",
    "out",
    type=click.Path(path_type=Path),
    required=True,
    help="The bundle to check with, pruned to 2:4 and exported to ONNX.",
)
@click.option(
    "-o",
    "--out",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Where to write the figures.  [default: {_FILE} in the bundle]",
)
@common_options
def command(out: Path, file: Path | None, **options: Any) -> None:
    """Check on this GPU whether engines agree, which layers run sparse, and how fast.

    Everything in one table, with PASS, FAIL or SKIP and the reason, and as JSON beside it: the
    environment, ONNX Runtime on CUDA, TensorRT engines dense and sparse, ONNX Runtime's TensorRT
    provider, single 2:4 products, and whole models with large layers. Takes some minutes.

    Exit codes: 4 there is no GPU, 6 something failed.
    """
    with session(options) as announce:
        from thanos_deploy import artifact, gpu, gpu_check

        with artifact.claim(out, artifact.Bundle.open(out).source) as bundle:
            result = gpu_check.run(bundle, announce=announce)
        artifact.write_json(file or out / _FILE, result)
    emit(options, result, lambda found: console.show_checks(found["checks"]))
    failed = [check for check in result["checks"] if check["outcome"] == "FAIL"]
    if failed:
        raise GateError(f"{failed[0]['name']}: {failed[0]['detail']}", fix=failed[0]["fix"])
    gpu.require()
