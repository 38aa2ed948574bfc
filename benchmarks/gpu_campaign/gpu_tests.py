"""The tests of the kernels that need a GPU, on this one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from thanos_deploy.gpu_records import CheckRow, Row
from thanos_deploy.steps import Task

_FOLDER = "tests/runtime/kernels"
_SOURCE = Path(__file__).parents[2]

# The other tests' fixtures export models, which this image may not be able to; and their options
# name plugins that it may not have.
_OPTIONS = (
    *("-m", "gpu", "-q", "--confcutdir", _FOLDER, "-p", "no:cacheprovider"),
    *("-c", "benchmarks/gpu_campaign/gpu_tests.toml", "--rootdir", "."),
)


def rows(task: Task) -> Iterator[Row]:
    """A row for each test; in a rehearsal one row, of whether they can be imported."""
    report = task.folder / "report.xml"
    how = ("--collect-only",) if task.device == "cpu" else (f"--junit-xml={report}",)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", _FOLDER, *_OPTIONS, *how],
        cwd=_SOURCE,
        # An image may have plugins that change how tests run.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    last = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
    if not report.exists():
        if done.returncode == 0:
            yield CheckRow("gpu-tests", "collected", "PASS", last)
        else:
            yield CheckRow("gpu-tests", "collected", "FAIL", last, "read log.txt")
        return
    for case in ElementTree.parse(report).iter("testcase"):
        yield _row(case)


def _row(case: ElementTree.Element) -> CheckRow:
    name = case.get("name", "a test without a name")
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            detail = (found.get("message") or kind).splitlines()[0]
            if kind == "skipped":
                return CheckRow("gpu-tests", name, "SKIP", detail)
            return CheckRow("gpu-tests", name, "FAIL", detail, "read log.txt")
    return CheckRow("gpu-tests", name, "PASS", f"{float(case.get('time', 0)):.2f} s")
