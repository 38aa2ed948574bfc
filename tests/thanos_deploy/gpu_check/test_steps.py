import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thanos_deploy.errors import GateError, PlatformError, UsageError
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.rows import CheckRow, HessianRow, KernelRow, Row, StepRow
from thanos_deploy.gpu_check import steps
from thanos_deploy.gpu_check.steps import Missing, Step, Task, choose

ROW = HessianRow(1, 2, 3.0)


def two_rows(task: Task) -> Iterator[Row]:
    yield ROW
    yield HessianRow(4, 5, 6.0)


def refuses(task: Task) -> Iterator[Row]:
    raise PlatformError("no such library", fix="install it")
    yield ROW


def fails(task: Task) -> Iterator[Row]:
    yield ROW
    raise GateError("differs", fix="report it")


def raises(task: Task) -> Iterator[Row]:
    yield ROW
    raise RuntimeError("CUDA error: an illegal memory access\nmore of it")


def runs_out_of_memory(task: Task) -> Iterator[Row]:
    import torch

    yield ROW
    raise torch.OutOfMemoryError("Tried to allocate 3 PiB")


def aborts(task: Task) -> Iterator[Row]:
    yield ROW
    print("before the crash")
    os.abort()


def is_killed(task: Task) -> Iterator[Row]:
    yield ROW
    os.kill(os.getpid(), signal.SIGKILL)


def exits(task: Task) -> Iterator[Row]:
    yield ROW
    os._exit(9)


def hangs(task: Task) -> Iterator[Row]:
    """Neither it nor what it started ends by itself, or when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    yield HessianRow(child.pid, 0, 0.0)
    time.sleep(600)


def checks(task: Task) -> Iterator[Row]:
    yield KernelRow("triton", "fp16", 4, 8, 1, 0.5, 0.001)
    yield KernelRow("triton", "fp16", 4, 8, 2, 0.0, 0.001)
    yield CheckRow("", "other", "SKIP", "not here")


def skips(task: Task) -> Iterator[Row]:
    yield KernelRow("cutlass", "fp16", 4, 8, 1, None, 0.001, "compute capability 8.x only")


def looks_around(task: Task) -> Iterator[Row]:
    (task.folder / "file").write_text("x")
    yield CheckRow("", str(task.folder), "PASS", f"{task.device}, {os.getpid()}")


def run(tmp_path: Path, *todo: Step, seconds: float = 600, **options: Any) -> tuple[Row, ...]:
    journal = tmp_path / "rows.jsonl"
    options.setdefault("log", tmp_path / "log.txt")
    steps.run(todo, Task("cpu"), journal, seconds=seconds, **options)
    return gpu_records.read_journal(journal)


@pytest.mark.slow
def test_whatever_becomes_of_a_step_its_rows_are_kept_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    found = run(
        tmp_path,
        Step("a", 30, two_rows),
        Step("b", 30, refuses),
        Step("c", 30, fails),
        Step("d", 30, raises),
        Step("e", 30, runs_out_of_memory),
        Step("f", 30, aborts),
        Step("g", 30, is_killed),
        Step("h", 30, exits),
        Step("i", 30, checks),
        Step("j", 30, skips),
    )
    assert [row for row in found if isinstance(row, HessianRow)] == [
        ROW, HessianRow(4, 5, 6.0), *[ROW] * 6
    ]  # fmt: skip
    ends = {row.step: (row.outcome, row.detail) for row in found if isinstance(row, StepRow)}
    assert ends == {
        "a": ("PASS", "2 rows"),
        "b": ("SKIP", "no such library"),
        "c": ("FAIL", "differs"),
        "d": ("FAIL", "RuntimeError: CUDA error: an illegal memory access; 1 rows are kept"),
        "e": ("FAIL", "out of memory: Tried to allocate 3 PiB; 1 rows are kept"),
        "f": ("FAIL", "the process of this step was killed by SIGABRT; 1 rows are kept"),
        "g": ("FAIL", "the process of this step was killed by SIGKILL; 1 rows are kept"),
        "h": ("FAIL", "the process of this step ended with exit code 9; 1 rows are kept"),
        "i": (
            "FAIL",
            "1 of 3 checks failed; the first: triton, fp16, 4 x 8, 1 tokens: error 5.0e-01, "
            "limit 1.0e-03",
        ),
        "j": ("SKIP", "compute capability 8.x only"),
    }
    log = (tmp_path / "log.txt").read_text()
    assert "--- d" in log
    assert "RuntimeError: CUDA error" in log
    assert "Fatal Python error: Aborted" in log


def test_a_step_that_does_not_end_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_GRACE", 0.2)
    started = time.monotonic()
    child, end, *_ = run(tmp_path, Step("hangs", 1, hangs))
    assert time.monotonic() - started < 20
    assert isinstance(end, StepRow)
    assert (end.outcome, end.detail) == ("FAIL", "stopped at its limit of 2 s; 1 rows are kept")
    assert isinstance(child, HessianRow)
    while time.monotonic() - started < 30 and Path(f"/proc/{child.inputs}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{child.inputs}").exists()


def test_each_step_has_a_process_and_a_folder_of_its_own(tmp_path: Path) -> None:
    found = run(tmp_path, Step("a", 9, looks_around), Step("b", 9, looks_around))
    first, second = (row for row in found if isinstance(row, CheckRow))
    assert first.name != second.name
    assert not Path(first.name).exists()
    assert first.detail.startswith("cpu, ")
    assert len({first.detail, second.detail, f"cpu, {os.getpid()}"}) == 3


def test_what_does_not_fit_or_lacks_something_is_named(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        Step("long", 500, two_rows),
        Step("other", 5, two_rows, needs=("bundle",)),
        Step("short", 5, two_rows, needs=("gpu",)),
        seconds=400,
        missing={"bundle": Missing("no bundle", "give --bundle")},
    )
    ends = [row for row in found if isinstance(row, StepRow)]
    assert [(row.step, row.outcome) for row in ends] == [
        ("long", "SKIP"),
        ("other", "SKIP"),
        ("short", "PASS"),
    ]
    assert re.fullmatch(r"skipped: it usually takes 500 s, and \d+ s were left", ends[0].detail)
    assert (ends[1].detail, ends[1].fix) == ("no bundle", "give --bundle")


def test_too_little_time_for_any_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 seconds are too few for any step: b, the shortest"):
        run(
            tmp_path,
            Step("card", 1, two_rows, always=True),
            Step("a", 50, two_rows),
            Step("b", 5, two_rows),
            seconds=3,
        )
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_card_is_read_while_a_step_runs_and_strangers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_FORGET", 0.0)

    class Card(nvml.Monitor):
        def __init__(self) -> None:
            self.clocks = iter([1e9, 2e9, *[1.5e9] * 9999])

        def read(self) -> nvml.Reading:
            return nvml.Reading(next(self.clocks), 700.0, ("Hot",), {7: 4 * 10**9}, (7, 8))

    *_, end = run(tmp_path, Step("a", 9, two_rows), card=Card())
    assert isinstance(end, StepRow)
    assert end.clocks_hz is not None
    assert 1e9 <= end.clocks_hz[0] <= end.clocks_hz[1] <= 2e9
    assert end.throttle_reasons == ("Hot",)
    assert end.other_processes == ("process 7, 4.0 GB", "process 8")


def test_a_card_that_does_not_answer_loses_no_step(tmp_path: Path) -> None:
    class Card(nvml.Monitor):
        def __init__(self) -> None:
            pass

        def read(self) -> nvml.Reading:
            raise RuntimeError("NVML: not supported")

    *_, end = run(tmp_path, Step("a", 9, two_rows), card=Card())
    assert isinstance(end, StepRow)
    assert (end.outcome, end.clocks_hz, end.other_processes) == ("PASS", None, ())


def test_kernels_of_a_process_that_is_not_listed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_FORGET", 0.3)

    class Card(nvml.Monitor):
        def __init__(self, *busy: float) -> None:
            self.busy = iter(busy)

        def read(self) -> nvml.Reading:
            return nvml.Reading(1e9, None, (), {}, busy=next(self.busy))

    # The first reading still has what the last step did.
    assert steps._others(Card(0.9, 0.0)) == ()
    assert steps._others(Card(*[0.4] * 99)) == ("kernels of other processes ran 40% of the time",)


def test_steps_are_chosen_by_name_or_family() -> None:
    every = [Step(name, 1, two_rows) for name in ("a", "gemm:x", "gemm:y")]

    def chosen(**how: Any) -> list[str]:
        return [step.name for step in choose(every, **how)]

    assert chosen() == ["a", "gemm:x", "gemm:y"]
    assert chosen(only=("gemm",)) == ["gemm:x", "gemm:y"]
    assert chosen(only=("gemm:y", "a")) == ["a", "gemm:y"]
    assert chosen(skip=("gemm",)) == ["a"]
    with pytest.raises(UsageError, match=r"no step 'spam'") as caught:
        chosen(only=("spam",))
    assert "gemm, gemm:x" in caught.value.fix or "gemm:x, gemm" in caught.value.fix
    with pytest.raises(UsageError, match="leave no step to run"):
        chosen(skip=("a", "gemm"))
    every.insert(0, Step("card", 1, two_rows, always=True))
    assert chosen(only=("a",)) == ["card", "a"]
    assert chosen(only=("a",), skip=("card",)) == ["a"]
    with pytest.raises(UsageError, match="leave no step to run"):
        chosen(skip=("a", "gemm"))
