"""Measure how much faster several processes of one thread prune than one such process.

Usage: python -m benchmarks.scaling [--model MODEL] [--blocks 2] [--rounds 3] [--pattern 2:4]
           [--preset best] [--processes 2]

The first blocks of a model are pruned by one process and by several processes, in turns. The length
of the critical path is compared: for each piece of the work (statistics up to a layer, the solver
of these layers, the tuning steps, the pass to the next block) the processor time of the slowest
rank, summed over the pieces. Ranks wait for each other between pieces, and waiting takes no
processor time. The sum is therefore the time that the work would take on otherwise idle processors,
with the communication of the ranks, but without the work of the operating system. Wall-clock times
are printed as well; they are meaningful only if nothing else runs. The efficiency is the time of
one process divided by the number of processes times their time. All figures are medians over the
rounds.

The table goes to standard output, and a JSON line follows.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.first_blocks import write_first_blocks
from benchmarks.smollm2 import gguf_path
from thanos_deploy import pattern
from thanos_deploy.stages.dense import Dense

WHOLE = "whole call"
_NAMES = {
    "collect": "statistics",
    "solve": "solver",
    "tune": "tuning",
    "forward": "on to the next block",
    "journal": "journal",
    WHOLE: WHOLE,
}


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one piece of work.

    Attributes:
        wall: wall-clock time of the slowest rank.
        processor: processor time of the rank that used most.
    """

    wall: float
    processor: float


def main() -> None:
    """Measure, or run as one of the ranks that are measured (--worker)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        _work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        whole = Dense(arguments.model or str(gguf_path())).checkpoint()
        write_first_blocks(whole, model, arguments.blocks)
        measured: dict[int, list[dict[str, Spent]]] = {1: [], arguments.processes: []}
        for number in range(arguments.rounds):
            for processes, rounds in measured.items():
                out = Path(folder) / f"{number}-{processes}"
                out.mkdir()
                rounds.append(_run(arguments, str(model), out, processes))
                shutil.rmtree(out)
    _show(measured, arguments.processes)


def _run(arguments: argparse.Namespace, model: str, out: Path, processes: int) -> dict[str, Spent]:
    """Prune once with some ranks, and return the seconds by activity."""
    given = ("--model", model, "--pattern", arguments.pattern, "--preset", arguments.preset)
    counts = ("--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen))
    worker = ("-m", "benchmarks.scaling", *given, *counts, "--worker", str(out))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ()), *worker],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # For each rank: maps an activity to the wall-clock and processor seconds of its pieces.
    said = [json.loads(path.read_bytes()) for path in sorted(out.glob("rank-*.json"))]
    spent: dict[str, Spent] = {}
    for activity in _NAMES:
        pieces = list(zip(*(one.get(activity, []) for one in said), strict=True))
        if pieces:
            spent[activity] = Spent(
                sum(max(wall for wall, _ in piece) for piece in pieces),
                sum(max(processor for _, processor in piece) for piece in pieces),
            )
    pieces_of_all = sum(one.processor for name, one in spent.items() if name != WHOLE)
    spent[WHOLE] = Spent(spent[WHOLE].wall, pieces_of_all + _between(said[0]))
    return spent


def _between(said: dict[str, list[tuple[float, float]]]) -> float:
    """Return the processor time of a rank outside the pieces of its work."""
    ((_, whole),) = said[WHOLE]
    parts = (part for name, pieces in said.items() if name != WHOLE for _, part in pieces)
    return whole - sum(parts)


def _work(arguments: argparse.Namespace) -> None:
    """Prune as one rank, and write the seconds of each piece of the work."""
    import torch

    from thanos_deploy.calibration import visit, walk
    from thanos_deploy.calibration.journal import Journal
    from thanos_deploy.cli import _progress
    from thanos_deploy.pruning.recipe import Recipe
    from thanos_deploy.pruning.result import PrunedBlock
    from thanos_deploy.ranks.start import connected
    from thanos_deploy.stages.checkpoints import prune_checkpoint
    from thanos_deploy.stages.request import PruneRequest
    from thanos_deploy.stages.texts import calibration

    torch.set_num_threads(1)
    _progress.quiet_libraries()
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def measured(activity: str) -> Iterator[None]:
        started, processor = time.perf_counter(), time.process_time()
        yield
        spent[activity].append((time.perf_counter() - started, time.process_time() - processor))

    class Clock(visit.Clock):
        @contextmanager
        def measure(self, activity: str) -> Iterator[None]:
            with measured(activity), super().measure(activity):
                yield

    walk.Clock = Clock  # type: ignore[attr-defined]
    checkpoint = Dense(arguments.model).checkpoint()
    request = PruneRequest.of(
        pattern.parse(arguments.pattern),
        preset=arguments.preset,
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
    )
    how = request.how
    assert isinstance(how, Recipe)
    taken = calibration(checkpoint, request.data, how.tuning.further(request.data.nsamples))
    model = arguments.worker / "model"
    with connected() as ranks, measured(WHOLE):
        if ranks.is_first:
            model.mkdir()
        prune_checkpoint(
            checkpoint,
            taken.ids,
            model if ranks.is_first else None,
            how,
            further=taken.further,
            journal=Journal(arguments.worker / "journal", {}, PrunedBlock),
        )
    (arguments.worker / f"rank-{ranks.rank}.json").write_text(json.dumps(spent))


def _show(measured: dict[int, list[dict[str, Spent]]], processes: int) -> None:
    """Print the table and the JSON line."""
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':22} {'1 process':>12} {f'{processes} processes':>12} {'efficiency':>11}", end="")
    print(f" {'wall 1':>8} {f'wall {processes}':>8}")
    for activity, name in _NAMES.items():
        found = {
            count: [one[activity] for one in rounds if activity in one]
            for count, rounds in measured.items()
        }
        if not all(found.values()):
            continue
        alone, many = (
            statistics.median(one.processor for one in found[count]) for count in (1, processes)
        )
        walls = [statistics.median(one.wall for one in found[count]) for count in (1, processes)]
        efficiency = alone / (processes * many)
        rows[name] = {
            "seconds": alone,
            "seconds_of_several": many,
            "efficiency": efficiency,
            "wall": walls[0],
            "wall_of_several": walls[1],
        }
        print(
            f"{name:22} {alone:10.2f} s {many:10.2f} s {efficiency:11.2f} "
            f"{walls[0]:6.1f} s {walls[1]:6.1f} s"
        )
    print(json.dumps({"processes": processes, "rounds": len(measured[1]), "rows": rows}))


if __name__ == "__main__":
    main()
