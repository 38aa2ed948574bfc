"""Time products with 2:4 weights on a GPU: dense, torch's semi-structured tensors, our kernels.

Usage: python -m benchmarks.semi_structured [--shapes 4096x4096 ...] [--tokens 1 16 64 256 2048]
           [--dtype fp16] [--kernels dense triton ...] [--samples 50] [-o FILE.json]

Prints median microseconds and the speed relative to dense as soon as they are measured, and writes
the records with the GPU and the software. The exit code is 4 without a GPU, and 1 if a kernel
failed. `--device cpu` rehearses with small shapes: it needs no GPU, and its times mean nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path

import torch

from runtime.kernels.timing import DTYPES, KERNELS, SHAPES, TOKENS, GemmTime, measure
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.errors import DeployError
from thanos_deploy.machine import environment


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, help="OUTPUTSxINPUTS")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=KERNELS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    found: list[GemmTime] = []
    try:
        for row in measure(
            arguments.shapes,
            arguments.tokens,
            dtypes=[arguments.dtype],
            kernels=arguments.kernels,
            device=arguments.device,
            samples=arguments.samples,
        ):
            found.append(row)
            print(line(row, found), flush=True)
    except DeployError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        # Also written if the GPU is lost during the run.
        if arguments.out and found:
            write(arguments.out, arguments.dtype, arguments.device, found)
    sys.exit(any(each.failed for each in found))


def write(path: Path, dtype: str, device: str, found: Sequence[GemmTime]) -> None:
    """Write the records, with the GPU and the software."""
    is_gpu = device == "cuda"
    files.write_json(
        path,
        {
            "gpu": torch.cuda.get_device_name() if is_gpu else "none, a rehearsal on the CPU",
            "cuda": torch.version.cuda,
            "dtype": dtype,
            "environment": encode(environment.describe()),
            "records": [asdict(each) for each in found],
        },
    )


def shape(text: str) -> tuple[int, int]:
    """Parse OUTPUTSxINPUTS."""
    outputs, inputs = map(int, text.split("x"))
    return outputs, inputs


def line(row: GemmTime, found: Sequence[GemmTime]) -> str:
    """Return the line to print for a row, with its speed relative to an earlier dense row."""
    where = f"{row.outputs:6d} x {row.inputs:6d}  tokens {row.tokens:5d}  {row.kernel:16s}"
    if row.seconds is None:
        return f"{where}  not measured: {row.reason}"
    sizes = (row.outputs, row.inputs, row.tokens)
    dense = [
        each.median
        for each in found
        if each.kernel == "dense" and (each.outputs, each.inputs, each.tokens) == sizes
    ]
    speed = dense[0] / row.median if dense else nan
    return f"{where}  {row.median * 1e6:9.1f} us  {speed:5.2f}x"


if __name__ == "__main__":
    main()
