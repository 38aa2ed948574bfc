"""Products with 2:4 weights on a GPU: dense, torch's semi-structured tensors, and our kernels.

Usage: python -m benchmarks.semi_structured [--shapes 4096x4096 ...] [--tokens 1 16 256 2048]
           [--dtype fp16] [--samples 50] [-o FILE.json]

Prints median microseconds and the speed relative to dense, and writes the records with what they
were measured on. Exits 4 where there is no GPU.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from runtime.kernels.timing import SHAPES, TOKENS, GemmTime, measure
from thanos_deploy import artifact, environment
from thanos_deploy.checkpoint import DTYPES
from thanos_deploy.errors import DeployError


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, help="OUTPUTSxINPUTS")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    try:
        found = measure(
            arguments.shapes,
            arguments.tokens,
            dtype=DTYPES[arguments.dtype],
            samples=arguments.samples,
        )
    except DeployError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    if arguments.out:
        artifact.write_json(
            arguments.out,
            {
                "gpu": torch.cuda.get_device_name(),
                "cuda": torch.version.cuda,
                "dtype": arguments.dtype,
                "environment": environment.describe(),
                "records": [asdict(each) for each in found],
            },
        )
    show(found)


def shape(text: str) -> tuple[int, int]:
    """Read OUTPUTSxINPUTS."""
    outputs, inputs = map(int, text.split("x"))
    return outputs, inputs


def show(found: list[GemmTime]) -> None:
    """Print a line for each record."""
    dense = {
        (each.outputs, each.inputs, each.tokens): each.median
        for each in found
        if each.kernel == "dense" and each.seconds
    }
    for each in found:
        size = (each.outputs, each.inputs, each.tokens)
        where = f"{each.outputs:6d} x {each.inputs:6d}  tokens {each.tokens:5d}  {each.kernel:10s}"
        if each.seconds is None:
            print(f"{where}  not measured: {each.reason}")
        else:
            speed = dense[size] / each.median
            print(f"{where}  {each.median * 1e6:9.1f} us  {speed:5.2f}x")


if __name__ == "__main__":
    main()
