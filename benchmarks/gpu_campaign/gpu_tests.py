"""Run the tests that need a GPU, on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_campaign import onnxruntime
from thanos_deploy.errors import PlatformError
from thanos_deploy.gpu.rows import CheckRow, Row
from thanos_deploy.gpu_check.steps import Task

_SOURCE = Path(__file__).parents[2]

# The project's own configuration names pytest plugins that an image may not have.
_OPTIONS = (
    *("-m", "gpu", "-q", "-p", "no:cacheprovider"),
    *("-c", "benchmarks/gpu_campaign/gpu_tests.toml", "--rootdir", "."),
)


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests with the same requirements.

    Attributes:
        step: name of the step that runs the tests.
        paths: paths of the tests.
        onnxruntime_paths: paths of tests that need ONNX Runtime on CUDA as well.
        options: options of pytest.
        packages: packages that importing the tests needs, beyond those of the kernels.
    """

    step: str
    paths: tuple[str, ...]
    onnxruntime_paths: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


# --confcutdir leaves out the fixtures of other tests, which export models.
KERNELS = Suite(
    "gpu-tests:kernels",
    ("tests/runtime/kernels",),
    options=("--confcutdir", "tests/runtime/kernels"),
)
PRUNING = Suite(
    "gpu-tests:pruning",
    ("tests/thanos_deploy/pruning/cuda",),
    options=("--confcutdir", "tests/thanos_deploy/pruning/cuda"),
)
ENGINES = Suite(
    "gpu-tests:engines",
    ("tests/runtime/test_torch_engine.py",),
    ("tests/runtime/test_memory.py",),
    packages=("onnx", "onnxscript", "onnxruntime"),
)


def rows(suite: Suite, task: Task) -> Iterator[Row]:
    """Yield a row for each test; in a rehearsal, one row that says whether they can be imported.

    Raises:
        PlatformError: a package that importing the tests needs is missing.
    """
    if missing := [name for name in suite.packages if find_spec(name) is None]:
        raise PlatformError(
            f"the tests cannot be imported without {', '.join(missing)}",
            fix=f"pip install {' '.join(missing)}",
        )
    paths = [*suite.paths]
    for path in suite.onnxruntime_paths:
        try:
            onnxruntime.require(task.device)
        except PlatformError as error:
            yield CheckRow(suite.step, path, "SKIP", error.message, error.fix)
        else:
            paths.append(path)
    report = task.folder / "report.xml"
    how = ("--collect-only",) if task.device == "cpu" else (f"--junit-xml={report}",)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *paths, *_OPTIONS, *suite.options, *how],
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
            yield CheckRow(suite.step, "collected", "PASS", last)
        else:
            yield CheckRow(suite.step, "collected", "FAIL", last, "read log.txt")
        return
    for case in ElementTree.parse(report).iter("testcase"):
        yield _row(suite.step, case)


def _row(step: str, case: ElementTree.Element) -> CheckRow:
    name = case.get("name", "a test without a name")
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            detail = (found.get("message") or kind).splitlines()[0]
            if kind == "skipped":
                return CheckRow(step, name, "SKIP", detail)
            return CheckRow(step, name, "FAIL", detail, "read log.txt")
    return CheckRow(step, name, "PASS", f"{float(case.get('time', 0)):.2f} s")
