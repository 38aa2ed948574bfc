import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_campaign import __main__ as campaign
from benchmarks.gpu_campaign import gpu_tests, onnxruntime, plan, summary
from runtime.kernels.linears import MAKERS
from tests.gpu_rows import RECORDS
from thanos_deploy.errors import PlatformError
from thanos_deploy.gpu import driver
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import (
    Card,
    CheckRow,
    GemmRow,
    HessianRow,
    KernelRow,
    ModelRow,
    Peaks,
    PruningRow,
    StepRow,
    WalkRow,
)
from thanos_deploy.gpu_check import models
from thanos_deploy.gpu_check.steps import Task

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[1]
BARE_IMAGE = SOURCE / "tests" / "bare_image"


def rehearse(
    out: Path, *arguments: str, python_path: tuple[Path, ...] = (), path: str | None = None
) -> tuple[subprocess.CompletedProcess[str], Records]:
    """What the command leaves; a process of its own because it sets what interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_campaign", "-o", out, "--rehearse", *arguments],
        cwd=SOURCE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (*python_path, SOURCE))),
            "PATH": path or os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done, gpu_records.read(out / "records.json")


def test_the_bare_image_lacks_what_it_lacks() -> None:
    script = (
        "import importlib, importlib.util\n"
        "import torch, transformers, rich, click, pytest\n"
        "for name in ('greenlet', 'cuda', 'gguf', 'onnxruntime', 'onnx', 'fastapi'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError:\n"
        "        continue\n"
        "    raise AssertionError(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BARE_IMAGE)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_on_the_bare_image_every_step_goes_through_on_a_cpu(tmp_path: Path) -> None:
    # Stands in for the real one, which needs a GPU: runs what it is to watch.
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "compute-sanitizer"
    program.write_text('#!/bin/sh\nshift 4\n"$@" && echo "========= ERROR SUMMARY: 0 errors"\n')
    program.chmod(0o755)
    done, records = rehearse(
        tmp_path / "out",
        python_path=(BARE_IMAGE,),
        path=f"{tools}{os.pathsep}{os.environ['PATH']}",
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("rows.jsonl", "records.json", "summary.txt", "log.txt")
    }
    assert records.rows == gpu_records.read_journal(tmp_path / "out" / "rows.jsonl")
    assert records.status == "REHEARSAL"

    ends = {row.step: row for row in records.of(StepRow)}
    assert list(ends) == [step.name for step in plan.steps("", rehearse=False)]
    skipped = {name for name, row in ends.items() if row.outcome == "SKIP"}
    # What cannot be done here says why: libraries and kernels that are for a GPU alone.
    only_on_a_gpu = {*MAKERS} - {"triton"}
    assert skipped == {
        *(f"correctness:{kernel}" for kernel in only_on_a_gpu - {"mma-sp"}),
        *(f"gemm:{kernel}" for kernel in only_on_a_gpu),
        *("onnxruntime", "gpu-tests:engines"),
    }
    for name in ("onnxruntime", "gpu-tests:engines"):
        assert "onnxruntime" in ends[name].detail

    kinds = (
        *(Card, Peaks, KernelRow, CheckRow, GemmRow, ModelRow, PruningRow, HessianRow, WalkRow),
    )
    assert [kind.__name__ for kind in kinds if not records.of(kind)] == []
    for kernel in ("triton", "mma-sp"):
        assert {row.outcome for row in records.of(KernelRow) if row.kernel == kernel} == {"PASS"}
    assert {row.tokens for row in records.of(GemmRow) if row.seconds} == {1, 16}
    timed = {(row.model, row.engine) for row in records.of(ModelRow) if row.seconds}
    # Nothing stands in for a GPU there, so the variant says why it has no time.
    refused = {row.engine for row in records.of(ModelRow) if row.reason is not None}
    assert refused == {"torch:mma-sp"}
    assert timed == {
        (model, f"torch:{variant}")
        for model, variants in models.MODELS.items()
        for variant in variants
        if f"torch:{variant}" not in refused
    }
    assert {row.preset for row in records.of(PruningRow)} == {"paper", "fast", "best"}
    assert {(row.preset, row.block) for row in records.of(WalkRow)} == {
        (preset, block) for preset in ("fast", "best") for block in (0, 1)
    }
    checks = {(row.step, row.name): row for row in records.of(CheckRow)}
    assert list(checks) == [
        ("sanitizer", "memcheck, triton"),
        ("sanitizer", "memcheck, mma-sp"),
        ("gpu-tests:kernels", "collected"),
        ("pruning", "64 x 64 against the CPU"),
        ("pruning", "factoring 64 columns"),
        ("walk:fast", "2 blocks of 64 against the CPU"),
        ("walk:best", "2 blocks of 64 against the CPU"),
        ("gpu-tests:pruning", "collected"),
    ]
    assert checks["sanitizer", "memcheck, triton"].detail == "ERROR SUMMARY: 0 errors"
    assert "tests collected" in checks["gpu-tests:kernels", "collected"].detail

    assert done.stdout == (tmp_path / "out" / "summary.txt").read_text() + "\n"
    assert "TIMES REHEARSAL" in done.stdout
    assert "card: 60/60" in done.stderr


def test_where_models_can_be_exported_the_engines_tests_can_be_imported(tmp_path: Path) -> None:
    (row,) = gpu_tests.rows(gpu_tests.ENGINES, Task("cpu", folder=tmp_path))
    assert isinstance(row, CheckRow)
    assert row.outcome == "PASS"
    assert row.detail.startswith("8/")


def test_without_onnxruntime_on_cuda_its_tests_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: cpu)
    first = next(iter(gpu_tests.rows(gpu_tests.ENGINES, Task("cuda", folder=tmp_path))))
    assert isinstance(first, CheckRow)
    assert (first.name, first.outcome) == ("tests/runtime/test_memory.py", "SKIP")


def test_a_rehearsed_choice_is_between_the_dense_product_and_triton(tmp_path: Path) -> None:
    (step,) = (step for step in plan.steps("", rehearse=True) if step.name == "model:2:4")
    rows = [row for row in step.rows(Task("cpu", folder=tmp_path)) if isinstance(row, ModelRow)]
    assert {row.phase for row in rows if row.seconds} == {"prefill", "decode"}
    (file,) = tmp_path.rglob("kernels.json")
    shapes = json.loads(file.read_bytes())["rows"]
    assert len(shapes) == 4
    for shape in shapes:
        timed = {one["kernel"] for one in shape["timed"] if all(one["seconds"])}
        assert timed == {"dense", "triton"} >= {*shape["chosen"]}


def test_what_was_measured_before_a_signal_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = "correctness:triton"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.gpu_campaign"),
            *("-o", out, "--rehearse", "--only", step),
        ],
        cwd=SOURCE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        ends = time.monotonic() + 60
        while not Records(gpu_records.read_journal(out / "rows.jsonl")).of(KernelRow):
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.1)
        # As `timeout` does: the process, and then its group.
        process.terminate()
        os.killpg(process.pid, signal.SIGTERM)
        printed, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert f"interrupted; what was measured is in {out}" in told
    records = gpu_records.read(out / "records.json")
    assert records.rows == gpu_records.read_journal(out / "rows.jsonl")
    assert {row.outcome for row in records.of(KernelRow)} == {"PASS"}
    last = records.rows[-1]
    assert isinstance(last, StepRow)
    assert (last.step, last.outcome) == (step, "FAIL")
    assert last.detail.startswith("interrupted")
    assert printed == (out / "summary.txt").read_text() + "\n"
    assert f"FAIL {step}" in printed


def test_with_onnxruntime_the_tiny_bundle_is_made_and_compared(tmp_path: Path) -> None:
    agreement, speed = onnxruntime.rows(Task("cpu", folder=tmp_path))
    assert isinstance(agreement, CheckRow)
    assert agreement.detail.startswith("logits differ by 0.0e+00")
    assert isinstance(speed, CheckRow)
    assert {agreement.outcome, speed.outcome} == {"PASS"}


def test_without_onnxruntime_on_cuda_no_bundle_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: cpu)
    with pytest.raises(PlatformError, match="here is built for CPUs only"):
        next(iter(onnxruntime.rows(Task("cuda", folder=tmp_path))))
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(bool(driver.probe().gpus), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_campaign", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        campaign.main()
    assert caught.value.code == 4
    assert (
        "no step could run: peaks: not measured (GPU: no NVIDIA driver" in capsys.readouterr().err
    )
    ends = gpu_records.read(tmp_path / "out" / "records.json").of(StepRow)
    assert {row.outcome for row in ends} == {"SKIP"}


def test_the_steps_of_the_day_fit_into_one_call() -> None:
    assert sum(step.seconds for step in plan.steps("", rehearse=False)) <= campaign.SECONDS


def test_the_summary_has_every_figure_and_fits() -> None:
    text = summary.of(RECORDS)
    assert text.startswith("TIMES VALID\nH100, compute capability 9.0, 80 GB, driver 580.1")
    assert "copy 3 TB/s; bf16 product of 8192^3 700 TFLOP/s" in text
    assert "4.50 (1.11x)" in text  # of 5.00 ms
    assert "1.60x" in text  # of 40 us
    assert "thanos 2:4, fast: 4096x14336 2.50 s, loss 0.100" in text
    product = RECORDS.of(GemmRow)[1]
    many = [replace(product, tokens=tokens, kernel="dense") for tokens in range(2000)]
    long = summary.of(Records((*RECORDS.rows, *many)))
    assert len(long) == summary.MOST_CHARACTERS < 12_000
    assert long.endswith("... the rest is in records.json\n")
