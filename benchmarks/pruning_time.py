"""Measure the time (in units) and memory of each pruning preset, and where the time goes.

Usage: python -m benchmarks.pruning_time [--model MODEL] [--pattern 2:4 unstructured:0.5 ...]
           [--preset fast best ...] [--blocks N] [--options JSON]

A unit is the processor time of two plain float32 forward passes of 16384 tokens through the blocks
of the dense model. Other work on the machine changes processor time less than wall-clock time.

Each preset prunes to each pattern in a process of its own, whose peak memory is recorded. One line
per block gives the seconds of the forward pass that collects statistics, of the solver, of tuning,
of the forward pass through the pruned block, and of the journal. Their sums follow. At the end come
a table of all runs and one JSON line for each run.

With `--blocks N` only the first N blocks of the model are pruned, and a unit is measured on these
blocks alone. The blocks of most models are alike, so the number of units is about that of the whole
model. The preset "max" trains the remaining weights and runs the output head for that, so it can be
measured only on the whole model. `--options` gives further options of `prune`, which change the
presets: '{"tune_steps": 16}'.
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

from benchmarks.first_blocks import write_first_blocks
from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods, pattern
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
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
    """One pruning run, which a process of its own measures.

    Attributes:
        folder: folder of the dense model.
        preset, pattern: preset and pattern to prune with.
        given: further options of `prune`, by keyword.
    """

    folder: Path
    preset: str
    pattern: Pattern
    given: dict[str, Any]


def main() -> None:
    """Prune with every preset to every pattern, and print time and memory."""
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
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    checkpoint = Dense(arguments.model or str(gguf_path())).checkpoint()
    names = ("calib", "nsamples", "seqlen")
    given = {**{name: getattr(arguments, name) for name in names}, **arguments.options}
    spawn = multiprocessing.get_context("spawn")
    records: list[Json] = []
    with tempfile.TemporaryDirectory() as kept:
        folder = checkpoint.folder
        if arguments.blocks is not None:
            folder = Path(kept)
            write_first_blocks(checkpoint, folder, arguments.blocks)
        for preset in arguments.preset:
            for chosen in arguments.pattern:
                run = Run(folder, preset, chosen, given)
                with spawn.Pool(1) as pool:  # peak memory is counted per process
                    records.append(pool.apply(measure, (run, torch.get_num_threads())))
    print(render(records))
    for record in records:
        print(json.dumps({**record, "environment": encode(environment.describe())}))


def measure(run: Run, threads: int) -> Json:
    """Prune once, print the seconds by activity, measure a unit, and return the record."""
    torch.set_num_threads(threads)
    _progress.quiet_libraries()
    checkpoint = Checkpoint.open(run.folder)
    request = PruneRequest.of(run.pattern, preset=run.preset, **run.given)
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
    """Prune as the stage does, with a journal; return the seconds by activity for each block."""
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
    """Return the processor seconds of two forward passes through the dense model's blocks."""
    model = load_model(checkpoint.folder)
    batch = max(1, TOKENS_PER_BATCH // ids.shape[1])
    processor = time.process_time()
    with torch.inference_mode():
        for part in (*ids.split(batch), *ids.split(batch)):
            model.base_model(input_ids=part, use_cache=False)
    return time.process_time() - processor


def render(records: list[Json]) -> str:
    """Return the table in Markdown."""
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
