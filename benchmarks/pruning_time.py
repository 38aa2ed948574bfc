"""Where pruning spends its time, block by block, and how much memory it takes.

Usage: python -m benchmarks.pruning_time [--model MODEL] [--pattern 2:4] [--preset best]

Prints one line a block: the forward pass that collects statistics, the solver, the forward pass
through the pruned block, the journal; then the sums, beside the bare cost of two forward passes,
and the peak resident memory of the process. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.smollm2 import gguf_path
from thanos_deploy import console, environment, pattern, walk
from thanos_deploy.calibrate import builtin_text, segments
from thanos_deploy.checkpoint import Checkpoint, load_model, load_tokenizer
from thanos_deploy.journal import Journal
from thanos_deploy.pipeline import Dense, prune_checkpoint
from thanos_deploy.prune import BlockReport
from thanos_deploy.requests import PruneRequest


def main() -> None:
    """Prune once and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--pattern", type=pattern.parse, default="2:4")
    parser.add_argument("--preset", choices=["best", "paper"], default="best")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    arguments = parser.parse_args()
    console.quiet_libraries()

    request = PruneRequest(
        pattern=arguments.pattern,
        preset=arguments.preset,
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
    )
    checkpoint = Dense(arguments.model or str(gguf_path())).checkpoint()
    ids = segments(
        builtin_text(),
        load_tokenizer(checkpoint.folder),
        count=request.nsamples,
        length=request.seqlen,
        seed=request.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        out = Path(folder) / "model"
        out.mkdir()
        journal = Journal(Path(folder) / "journal", {}, BlockReport)
        blocks = prune_checkpoint(checkpoint, ids, out, request, journal=journal)
        total = time.perf_counter() - started
    peak = environment.peak_memory_bytes()
    print("block  collect s  solve s  forward s  journal s")
    for index, block in enumerate(blocks):
        print(
            f"{index:5d}  {block.seconds['collect']:9.2f}  {block.seconds['solve']:7.2f}"
            f"  {block.seconds['forward']:9.2f}  {block.seconds['journal']:9.2f}"
        )
    collect, solve, forward, journaling = (
        sum(block.seconds[part] for block in blocks)
        for part in ("collect", "solve", "forward", "journal")
    )
    bare = two_forward_passes(checkpoint, ids)
    print(
        f"  sum  {collect:9.2f}  {solve:7.2f}  {forward:9.2f}  {journaling:9.2f}"
        f"   whole call {total:.1f} s"
    )
    print(f"two bare forward passes through the blocks: {bare:.1f} s ({total / bare:.2f}x)")
    print(f"peak resident memory: {peak / 1e6:.0f} MB")
    print(
        json.dumps(
            {
                **request.to_json(),
                "tokens": ids.numel(),
                "collect_seconds": collect,
                "solve_seconds": solve,
                "forward_seconds": forward,
                "journal_seconds": journaling,
                "whole_seconds": total,
                "two_forward_passes_seconds": bare,
                "peak_memory_bytes": peak,
                "environment": environment.describe(),
            }
        )
    )


def two_forward_passes(checkpoint: Checkpoint, ids: torch.Tensor) -> float:
    """Seconds of running the calibration tokens through the dense model's blocks, twice."""
    model = load_model(checkpoint.folder)
    batch = max(1, walk.TOKENS_PER_BATCH // ids.shape[1])
    started = time.perf_counter()
    with torch.inference_mode():
        for part in (*ids.split(batch), *ids.split(batch)):
            model.base_model(input_ids=part, use_cache=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
