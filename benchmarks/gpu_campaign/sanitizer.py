"""Run our kernels under compute-sanitizer, to find out-of-bounds accesses and data races."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from thanos_deploy.gpu.rows import CheckRow, Row
from thanos_deploy.gpu_check.steps import Task

_NAME = "compute-sanitizer"
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")

# Pairs of tool and kernel. Triton's kernels are left out of racecheck: Triton places their barriers
# itself, and they would take minutes.
_RUNS = (("memcheck", "triton"), ("memcheck", "mma-sp"), ("racecheck", "mma-sp"))

# Exit code of compute-sanitizer for a finding; Python's own failures have other exit codes.
_FOUND = 99


def rows(task: Task) -> Iterator[Row]:
    """Yield a row for each tool and kernel; in a rehearsal, where no tool runs, only for memcheck.

    All runs are concurrent, because nothing is timed and each keeps one processor busy.
    """
    runs = _RUNS if task.device == "cuda" else _RUNS[:2]
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda run: check(run[0], run[1], task.device), runs)


def check(tool: str, kernel: str, device: str) -> CheckRow:
    """Run small products of one kernel under one tool."""
    name = f"{tool}, {kernel}"
    program = shutil.which(_NAME, path=os.pathsep.join((os.environ["PATH"], *_PLACES)))
    if program is None:
        return CheckRow("sanitizer", name, "SKIP", f"{_NAME} is not installed")
    watched = [sys.executable, "-m", f"{__package__}.small_products", device, kernel]
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", str(_FOUND), *watched],
        cwd=Path(__file__).parents[2],
        # Every tensor gets an allocation of its own, so that an access past its end is seen.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    told = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=====")]
    if done.returncode == 0:
        return CheckRow("sanitizer", name, "PASS", told[-1] if told else "nothing found")
    if done.returncode == _FOUND:
        errors = [line for line in told if line and not line.startswith("COMPUTE-SANITIZER")]
        first = errors[0] if errors else "it does not say what"
        return CheckRow(
            "sanitizer", name, "FAIL", first, "read log.txt; do not use the kernel that it names"
        )
    last = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
    detail = f"ended with exit code {done.returncode}: {last}"
    return CheckRow("sanitizer", name, "FAIL", detail, "read log.txt")
