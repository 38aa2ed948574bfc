"""Compare the processor time of a blockwise 2:4 product on a CPU with that of the dense product.

Usage: python -m benchmarks.blockwise [--outputs 4096] [--inputs 4096]

Runs on one thread. Successive calls use different copies of the weight, which together exceed the
cache. The figure is the minimum over several rounds, in processor time, so that other processes on
the machine do not count.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.kernels import timing
from runtime.kernels.operator import hold

TOKENS = (1, 8, 64, 512)
_COPIES = 3
_ROUNDS = 5


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| dtype | tokens | dense, ms | 2:4 blockwise, ms | times the dense |")
    print("|---|---|---|---|---|")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        weight = timing.random_two_four(arguments.outputs, arguments.inputs, dtype, device="cpu")
        products = [
            [hold(kernel, weight.clone(), "weight") for _ in range(_COPIES)]
            for kernel in ("dense", "blockwise")
        ]
        for tokens in TOKENS:
            x = torch.randn(tokens, arguments.inputs).to(dtype)
            dense, packed = (seconds(copies, x) for copies in products)
            print(
                f"| {name} | {tokens} | {1e3 * dense:.1f} | {1e3 * packed:.1f} | "
                f"{packed / dense:.1f} |",
                flush=True,
            )


def seconds(copies: Sequence[Callable[[Tensor, None], Tensor]], x: Tensor) -> float:
    """Return the processor seconds of a product: the minimum of several rounds over all copies."""
    rounds = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            begin = time.process_time()
            for multiply in copies:
                multiply(x, None)
            rounds.append((time.process_time() - begin) / len(copies))
    return min(rounds)


if __name__ == "__main__":
    main()
