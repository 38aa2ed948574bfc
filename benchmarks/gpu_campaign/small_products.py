"""Run a few small products and nothing else, for compute-sanitizer to watch.

python -m benchmarks.gpu_campaign.small_products DEVICE KERNEL...
"""

import sys
from contextlib import nullcontext

import torch

from benchmarks.gpu_campaign import rehearsal
from runtime.kernels import linears, timing
from thanos_deploy.errors import DeployError

_SHAPES, _TOKENS = ((130, 192), (256, 512)), (1, 5, 17, 70)

# Shape for Triton's interpreter, which takes seconds for a larger one.
_REHEARSED = ((10, 192),)


def main() -> None:
    """Run the products of the kernels that are named on the command line."""
    device, *kernels = sys.argv[1:]
    with rehearsal.on_a_cpu() if device == "cpu" else nullcontext():
        for kernel in kernels:
            multiply(kernel, device)


def multiply(kernel: str, device: str) -> None:
    """Run and print all products of one kernel."""
    for shape in _SHAPES if device == "cuda" else _REHEARSED:
        weight = timing.random_two_four(*shape, torch.float16, device=device)
        for tokens in _TOKENS:
            x = torch.randn(tokens, shape[1], dtype=torch.float16, device=device)
            try:
                y = linears.MAKERS[kernel](weight, "weight")(x, None)
            except DeployError as refusal:
                print(f"{kernel}: {refusal.message}")
            else:
                print(f"{kernel}: {tuple(y.shape)}, norm {float(y.float().norm()):.3f}")


if __name__ == "__main__":
    main()
