"""A campaign against what the project promises.

Usage: python -m benchmarks.reliability [--minutes 10] [--seed 0] [--only PART ...] [--again]

The minutes are shared by the parts that run. Each part's figures are written to
benchmarks/results/reliability.json as soon as it is done; a later call with the same minutes and
seed goes on with the parts that are missing (--again runs them all). Prints the table and puts it
into docs/reliability.md. Exit code 1 if a figure is not what it is to be.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_campaign.onnxruntime import make
from benchmarks.reliability import disk_full, kills, server
from benchmarks.reliability.part import Part, Setting
from benchmarks.reliability.record import Result, Results, publish, table

PARTS: tuple[Part, ...] = (kills.PART, disk_full.PART, server.PART)
RESULTS = Path(__file__).parents[1] / "results" / "reliability.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def main() -> None:
    """Run, print, write; exit with 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--bundle", type=Path, help="a small one; made if it is not given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()

    results = Results.read(given.results)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    missing = [
        part
        for part in chosen
        if given.again
        or part.name not in results.parts
        or not results.parts[part.name].answers(given.minutes, given.seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        bundle = (given.bundle or make(Path(folder))) if missing else None
        for part in missing:
            assert bundle
            room = Path(folder) / part.name
            room.mkdir()
            started = time.monotonic()
            figures = part.run(Setting(bundle, room, 60 * given.minutes / len(chosen), given.seed))
            result = Result(given.minutes, given.seed, time.monotonic() - started, tuple(figures))
            results = results.plus(part.name, result)
            results.write(given.results)
    shown = table(results, PARTS)
    publish(given.page, shown)
    print(shown)
    sys.exit(not all(results.parts[part.name].passed for part in chosen))


if __name__ == "__main__":
    main()
