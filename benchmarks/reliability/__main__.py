"""Test the project's promises with faults and attacks.

Usage: python -m benchmarks.reliability [--minutes 10] [--seed 0] [--only PART ...] [--again]
       python -m benchmarks.reliability --table

The minutes are shared by the parts that run. The results of a part are written to
benchmarks/results/reliability.json while it runs. A later call continues the parts that have not
yet done enough; with --more it continues all parts, and with --again it starts anew. Prints the
table and writes it into docs/reliability.md; --table does nothing else. The exit code is 1 if a
figure is not as required, or a part has not run.
"""

import argparse
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from benchmarks import pages
from benchmarks.gpu_campaign.onnxruntime import make
from benchmarks.reliability import (
    disk_full,
    kills,
    memory,
    mutations,
    power_cuts,
    server,
    soaked,
    two_processes,
)
from benchmarks.reliability.part import Part, Setting
from benchmarks.reliability.record import COMMAND, Result, Results, table
from benchmarks.reliability.works import settle

PARTS: tuple[Part, ...] = (
    kills.PART,
    power_cuts.PART,
    disk_full.PART,
    memory.PART,
    two_processes.PART,
    mutations.PART,
    server.PART,
    soaked.PART,
)
RESULTS = Path(__file__).parents[1] / "results" / "reliability.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_WRITE_SECONDS = 10.0


def main() -> None:
    """Run the parts, and write and print the table; exit with 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--more", action="store_true", help="run parts again that have run enough")
    parser.add_argument("--again", action="store_true", help="discard the earlier results")
    parser.add_argument("--table", action="store_true", help="run nothing, and write the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()

    results = Results.read(given.results)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    if given.again:
        kept = {name: one for name, one in results.parts.items() if name not in names(chosen)}
        results = Results(parts=kept)
    missing = [
        part
        for part in chosen
        if not given.table and (given.more or not results.parts.get(part.name, Result()).is_enough)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settle(Path(folder))
        small, real = cache(lambda: make(Path(folder))), cache(server.real)
        for part in missing:
            room = Path(folder) / part.name
            room.mkdir()
            before = results.parts.get(part.name, Result())
            seconds = 60 * given.minutes / len(missing)
            bundle = real if part is server.PART else small
            setting = Setting(bundle, room, seconds, given.seed, before.values)
            results = go_on(part, setting, results, given.results)
    shown = table(results, PARTS)
    pages.rewrite(given.page, COMMAND, shown)
    print(shown)
    sys.exit(not all(part.name in results.parts for part in chosen) or not passed(results, chosen))


def go_on(part: Part, setting: Setting, results: Results, path: Path) -> Results:
    """Run a part, and write its results every few seconds."""
    result = results.parts.get(part.name, Result())
    result = Result(result.runs + 1, result.seconds, result.figures, result.faults)
    began = written = time.monotonic()
    for found in part.run(setting):
        for fault in found.faults:
            print(f"{part.name}: {fault}", file=sys.stderr, flush=True)
        now = time.monotonic()
        result = result.after(found, now - began)
        began = now
        if now - written > _WRITE_SECONDS:
            results.plus(part.name, result).write(path)
            written = now
    results = results.plus(part.name, result)
    results.write(path)
    return results


def names(parts: list[Part]) -> set[str]:
    """Return the names of the parts."""
    return {part.name for part in parts}


def passed(results: Results, parts: list[Part]) -> bool:
    """Whether all figures of these parts are as required."""
    return all(results.parts[part.name].passed for part in parts)


if __name__ == "__main__":
    main()
