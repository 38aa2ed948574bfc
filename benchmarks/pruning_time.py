"""Measure the time (in units) and memory of each preset of pruning, and where the time goes.

Usage: python -m benchmarks.pruning_time [--model MODEL] [--pattern 2:4 unstructured:0.5 ...]
           [--preset fast best ...] [--blocks N] [--calib-forward auto]

A unit is two bare float32 passes of 16384 tokens through the blocks. It is counted in processor
time, which other work on the machine changes less than the time of the clock.

Every preset prunes to every pattern in a process of its own, whose peak memory is printed. One line
a block: the forward pass that collects statistics, the solver, tuning, the forward pass through the
pruned block, the journal; then their sums; at the end a table of all. JSON lines follow.

With `--blocks N` only the first N blocks of the model are pruned, and the bare passes go through
those: the blocks of most models are alike, so units are about those of the whole. The preset "max",
which trains the remaining weights, can be measured only on the whole model, because the training
also runs the output head.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods, pattern
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json, write_json
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.load import load_model
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.layers import ACTIVITIES
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.stages.checkpoints import (
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import Calibration, calibration
from thanos_deploy.stages.training import recover_checkpoint

UNIT_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Run:
    """What a process measures.

    Attributes:
        folder: of the dense model.
        preset, pattern: what is asked for.
        given: other options of `prune`.
    """

    folder: Path
    preset: str
    pattern: Pattern
    given: dict[str, Any]


def main() -> None:
    """Prune by every preset to every pattern, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--pattern",
        type=pattern.parse,
        nargs="+",
        default=[pattern.parse("2:4"), pattern.parse("unstructured:0.5")],
    )
    parser.add_argument("--preset", nargs="+", choices=methods.PRESET_NAMES, default=["best"])
    parser.add_argument("--blocks", type=int, default=None)
    parser.add_argument("--calib", default="builtin")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib-forward", choices=["auto", "fp32", "bf16"], default="auto")
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    checkpoint = Dense(arguments.model or str(gguf_path())).checkpoint()
    names = ("calib", "nsamples", "seqlen", "calib_forward")
    given = {name: getattr(arguments, name) for name in names}
    spawn = multiprocessing.get_context("spawn")
    records: list[Json] = []
    with tempfile.TemporaryDirectory() as kept:
        folder = checkpoint.folder
        if arguments.blocks is not None:
            folder = Path(kept)
            first_blocks(checkpoint, folder, arguments.blocks)
        for preset in arguments.preset:
            for chosen in arguments.pattern:
                run = Run(folder, preset, chosen, given)
                with spawn.Pool(1) as pool:  # a process for each, as the most memory is a process's
                    records.append(pool.apply(measure, (run, torch.get_num_threads())))
    print(render(records))
    for record in records:
        print(json.dumps({**record, "environment": encode(environment.describe())}))


def first_blocks(checkpoint: Checkpoint, folder: Path, count: int) -> None:
    """Write the model of the first blocks of another one."""
    copy_companions(checkpoint.folder, folder, None)
    config = json.loads((folder / "config.json").read_bytes())
    write_json(folder / "config.json", {**config, "num_hidden_layers": count})
    gone = tuple(block.prefix for block in checkpoint.blocks[count:])
    names = [
        stored for name, stored in checkpoint.weights.stored.items() if not name.startswith(gone)
    ]
    save_file(checkpoint.weights.read(names), folder / "model.safetensors", {"format": "pt"})


def measure(run: Run, threads: int) -> Json:
    """Prune once, print where the time went, and take the measure of a unit beside it."""
    torch.set_num_threads(threads)
    _progress.quiet_libraries()
    checkpoint = Checkpoint.open(run.folder)
    given = {**run.given}
    if isinstance(run.pattern, pattern.Structured):
        del given["calib_forward"]
    request = PruneRequest.of(run.pattern, preset=run.preset, **given)
    data = request.data
    taken = calibration(checkpoint, data, request.how.tuning.further(data.nsamples))
    with tempfile.TemporaryDirectory() as folder:
        started, processor = time.perf_counter(), time.process_time()
        spent = prune(checkpoint, request, taken, Path(folder))
        whole = time.perf_counter() - started
        processor = time.process_time() - processor
    sums = {part: sum(one.get(part, 0.0) for one in spent) for part in ACTIVITIES}
    peak = environment.peak_memory_bytes()
    unit = two_forward_passes(checkpoint, taken.ids) * UNIT_TOKENS / taken.ids.numel()
    print(f"{run.preset}, {run.pattern}\nblock  {'  '.join(f'{part:>7s}' for part in ACTIVITIES)}")
    for index, one in enumerate(spent):
        times = (one.get(part, 0.0) for part in ACTIVITIES)
        print(f"{index:5d}  {'  '.join(f'{seconds:7.2f}' for seconds in times)}")
    print(f"  sum  {'  '.join(f'{seconds:7.2f}' for seconds in sums.values())}", flush=True)
    return {
        "preset": run.preset,
        **request.to_json(),
        "blocks": len(spent),
        "tokens": taken.ids.numel(),
        "tuned_on_tokens": taken.ids.numel() + taken.further.numel(),
        **{f"{part}_seconds": seconds for part, seconds in sums.items()},
        "whole_seconds": whole,
        "processor_seconds": processor,
        "unit_processor_seconds": unit,
        "units": processor / unit,
        "peak_memory_bytes": peak,
    }


def prune(
    checkpoint: Checkpoint, request: PruneRequest, taken: Calibration, folder: Path
) -> list[Mapping[str, float]]:
    """Prune as the stage does, journal included; seconds by activity, of each block."""
    out, ids, further = folder / "model", taken.ids, taken.further
    out.mkdir()
    match request.how:
        case Cut() as cut:
            plan = plan_widths(checkpoint, survey_blocks(checkpoint, ids, cut), cut)
            cuts = Journal(folder / "journal", {}, CutBlock)
            blocks = shrink_checkpoint(
                checkpoint, ids, out, plan, cut, further=further, journal=cuts
            )
            spent = [block.seconds for block in blocks]
        case Recipe() as recipe:
            kept = Journal(folder / "journal", {}, PrunedBlock)
            pruned = prune_checkpoint(checkpoint, ids, out, recipe, further=further, journal=kept)
            spent = [block.seconds for block in pruned]
    if request.recover:
        recover_checkpoint(checkpoint, taken.text, out, request)
    return spent


def two_forward_passes(checkpoint: Checkpoint, ids: torch.Tensor) -> float:
    """Processor seconds of the tokens' way through the blocks of the dense model, twice."""
    model = load_model(checkpoint.folder)
    batch = max(1, TOKENS_PER_BATCH // ids.shape[1])
    processor = time.process_time()
    with torch.inference_mode():
        for part in (*ids.split(batch), *ids.split(batch)):
            model.base_model(input_ids=part, use_cache=False)
    return time.process_time() - processor


def render(records: list[Json]) -> str:
    """The table in Markdown."""
    lines = ["| preset | pattern | units | processor s | unit, processor s | most memory, MB |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    lines += [
        f"| {one['preset']} | {one['pattern']} | {one['units']:.2f} | "
        f"{one['processor_seconds']:.1f} | {one['unit_processor_seconds']:.1f} | "
        f"{one['peak_memory_bytes'] / 1e6:.0f} |"
        for one in records
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
