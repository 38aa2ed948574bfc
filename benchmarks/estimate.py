"""Compare the estimates of `--dry-run` with the time and memory that pruning then takes.

Usage: python -m benchmarks.estimate [--model MODEL] [--patterns 2:4 ...] [--preset best]

Prints, for every pattern, the estimated and the measured seconds of each activity and the peak
memory, and their ratios. The last line is JSON. Each pattern is pruned in a process of its own,
because peak memory is counted per process. The survey before cutting runs in `--dry-run` too, so
for the survey two measurements are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods
from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment


def main() -> None:
    """Estimate and prune once for every pattern."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "unstructured:0.5", "structured:0.3"]
    )
    parser.add_argument("--preset", choices=methods.PRESET_NAMES, default="best")
    arguments = parser.parse_args()
    rows = []
    print("pattern            activity   estimated   measured   ratio")
    for pattern in arguments.patterns:
        model = arguments.model or str(gguf_path())
        options = ("--pattern", pattern, "--preset", arguments.preset, "--json", "-q")
        with tempfile.TemporaryDirectory() as folder:
            out = ("-o", str(Path(folder) / "out"))
            plan = _run("prune", model, *options, *out, "--dry-run")["estimate"]
            result = _run("prune", model, *options, *out)
        pairs = {
            name: (seconds, result[f"{name}_seconds"]) for name, seconds in plan["seconds"].items()
        }
        pairs["total"] = (plan["total_seconds"], sum(value for _, value in pairs.values()))
        pairs["MB"] = (plan["memory_bytes"] / 1e6, result["peak_memory_bytes"] / 1e6)
        for name, (estimated, value) in pairs.items():
            ratio = f"{estimated / value:.2f}"
            print(f"{pattern:18s} {name:9s} {estimated:10.1f} {value:10.1f} {ratio:>7s}")
        rows.append({"pattern": pattern, "estimate": plan, "measured": pairs})
    print(json.dumps({"rows": rows, "environment": encode(environment.describe())}))


def _run(*words: str) -> Any:
    command = [sys.executable, "-c", "from thanos_deploy.cli import main; main()", *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    main()
