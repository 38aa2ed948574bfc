"""A few small products of one kernel, with nothing around them: what compute-sanitizer watches.

python -m benchmarks.gpu_campaign.small_products DEVICE KERNEL...
"""

import sys

import torch

from runtime.kernels import linears, timing
from thanos_deploy.errors import DeployError

_SHAPES, _TOKENS = ((130, 192), (256, 512)), (1, 5, 17, 70)


def main() -> None:
    """Multiply."""
    device, *kernels = sys.argv[1:]
    for kernel in kernels:
        for shape in _SHAPES:
            weight = timing.random_two_four(*shape, torch.bfloat16, device=device)
            for tokens in _TOKENS:
                x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=device)
                try:
                    y = linears.MAKERS[kernel](weight, "weight")(x, None)
                except DeployError as refusal:
                    print(f"{kernel}: {refusal.message}")
                else:
                    print(f"{kernel}: {tuple(y.shape)}, norm {float(y.float().norm()):.3f}")


if __name__ == "__main__":
    main()
