"""Where pruning spends its time, block by block, and how much memory it takes.

Usage: python -m benchmarks.pruning_time [--model MODEL] [--pattern 2:4 unstructured:0.5 ...]
           [--preset best] [--calib-forward auto]

Prints one line a block: the forward pass that collects statistics, the solver, tuning, the forward
pass through the pruned block, the journal; then the sums, and last, for all patterns, the
same beside the bare cost of two float32 forward passes: as time, and as processor time, which other
work on the machine changes less. Peak resident memory is that of the process so far. JSON lines
follow.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods, pattern
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.pruning.layers import ACTIVITIES
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH
from thanos_deploy.stages.checkpoints import prune_checkpoint
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import calibration


def main() -> None:
    """Prune once and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--pattern",
        type=pattern.parse,
        nargs="+",
        default=[pattern.parse("2:4"), pattern.parse("unstructured:0.5")],
    )
    parser.add_argument("--preset", choices=methods.PRESET_NAMES, default="best")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib-forward", choices=["auto", "fp32", "bf16"], default="auto")
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    checkpoint = Dense(arguments.model or str(gguf_path())).checkpoint()
    records = []
    for chosen in arguments.pattern:
        request = PruneRequest.of(
            chosen,
            preset=arguments.preset,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            calib_forward=arguments.calib_forward,
        )
        assert isinstance(request.how, Recipe)
        _, ids, _ = calibration(checkpoint, request.data)  # the same for every pattern
        records.append({**request.to_json(), **measure(checkpoint, ids, request.how)})
    bare = two_forward_passes(checkpoint, ids)
    print(f"two bare forward passes through the blocks: {bare[0]:.1f} s, {bare[1]:.1f} s processor")
    for record in records:
        record["two_forward_passes_seconds"], record["two_forward_passes_processor_seconds"] = bare
        whole, processor = record["whole_seconds"], record["processor_seconds"]
        print(
            f"{record['pattern']}: solver {record['solve_seconds']:.1f} s, "
            f"whole call {whole:.1f} s ({whole / bare[0]:.2f}x), "
            f"processor {processor:.1f} s ({processor / bare[1]:.2f}x), "
            f"peak {record['peak_memory_bytes'] / 1e6:.0f} MB"
        )
    for record in records:
        print(json.dumps({**record, "environment": encode(environment.describe())}))


def measure(checkpoint: Checkpoint, ids: torch.Tensor, recipe: Recipe) -> Json:
    """Prune once and print where the time went."""
    with tempfile.TemporaryDirectory() as folder:
        started, processor = time.perf_counter(), time.process_time()
        out = Path(folder) / "model"
        out.mkdir()
        journal = Journal(Path(folder) / "journal", {}, PrunedBlock)
        blocks = prune_checkpoint(checkpoint, ids, out, recipe, journal=journal)
        total = time.perf_counter() - started
        processor = time.process_time() - processor
    print(f"{recipe.pattern}\nblock  {'  '.join(f'{part:>7s}' for part in ACTIVITIES)}")
    for index, block in enumerate(blocks):
        times = (block.seconds.get(part, 0.0) for part in ACTIVITIES)
        print(f"{index:5d}  {'  '.join(f'{seconds:7.2f}' for seconds in times)}")
    sums = {part: sum(block.seconds.get(part, 0.0) for block in blocks) for part in ACTIVITIES}
    print(
        f"  sum  {'  '.join(f'{seconds:7.2f}' for seconds in sums.values())}"
        f"   whole call {total:.1f} s"
    )
    return {
        "tokens": ids.numel(),
        **{f"{part}_seconds": seconds for part, seconds in sums.items()},
        "whole_seconds": total,
        "processor_seconds": processor,
        "peak_memory_bytes": environment.peak_memory_bytes(),
    }


def two_forward_passes(checkpoint: Checkpoint, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds, and processor seconds, of the calibration tokens' way through the dense model."""
    model = load_model(checkpoint.folder)
    batch = max(1, TOKENS_PER_BATCH // ids.shape[1])
    started, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for part in (*ids.split(batch), *ids.split(batch)):
            model.base_model(input_ids=part, use_cache=False)
    return time.perf_counter() - started, time.process_time() - processor


if __name__ == "__main__":
    main()
