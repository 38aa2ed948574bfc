import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu_rows import CARD
from thanos_deploy.errors import InputError
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.records import Journal, Records
from thanos_deploy.gpu.rows import (
    KINDS,
    CheckRow,
    GemmRow,
    HessianRow,
    KernelRow,
    ModelRow,
    Peaks,
    PruningRow,
    Row,
    StepRow,
    WalkRow,
)

ROWS: tuple[Row, ...] = (
    CARD,
    Peaks(3e12, "bf16", 8192, 7e14),
    KernelRow("triton", "fp16", 37, 148, 5, 1e-4, 1e-3),
    GemmRow("dense", "bf16", 4096, 4096, 1, (1e-5, 2e-5, 4e-5), 1e-3),
    GemmRow("cutlass", "bf16", 4096, 4096, 1, None, None, "compute capability 8.x only"),
    ModelRow("2:4", "torch:sparse", "bf16", 32, 8 * 10**9, "decode", 16, 512, (3e-3,), 10**10),
    PruningRow("thanos", "fast", "2:4", 4096, 14336, 2.5, 0.1),
    HessianRow(4096, 262144, 1.5),
    WalkRow("thanos", "best", "2:4", 4096, 14336, 262144, 3, {"solve": 2.5}, 10**10, 3 * 10**9),
    CheckRow("sanitizer", "memcheck", "FAIL", "an error", "report it"),
    StepRow("gemm", "PASS", "40 rows", seconds=120.0, clocks_hz=(1.7e9, 1.98e9)),
)


def test_every_kind_of_row_is_among_the_examples() -> None:
    assert {type(row) for row in ROWS} == set(KINDS.values())


def test_a_document_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    gpu_records.write(path, Records(ROWS))
    assert [entry.name for entry in tmp_path.iterdir()] == ["h100.json"]
    found = gpu_records.read(path)
    assert found == Records(ROWS)
    assert found.card == CARD
    assert [row.kernel for row in found.of(GemmRow)] == ["dense", "cutlass"]
    assert found.of(GemmRow)[0].median == 2e-5
    assert math.isnan(found.of(GemmRow)[1].median)
    assert gpu_records.read_all(tmp_path) == (found,)
    assert gpu_records.read_all(tmp_path / "missing") == ()


def test_a_journal_gives_back_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ROWS:  # opened again for each, as by one process after the other
        with Journal(path) as journal:
            journal.add(row)
    assert gpu_records.read_journal(path) == ROWS
    assert gpu_records.joined([path, tmp_path / "missing", path]) == Records(ROWS + ROWS)


def test_rows_are_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from thanos_deploy.gpu.records import Journal\n"
        "from thanos_deploy.gpu.rows import HessianRow\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.add(HessianRow(1, 2, 3.0))\n"
        "journal.add(HessianRow(4, 5, 6.0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert gpu_records.read_journal(path) == (HessianRow(1, 2, 3.0), HessianRow(4, 5, 6.0))
    os.truncate(path, path.stat().st_size - 3)  # the second was being written
    assert gpu_records.read_journal(path) == (HessianRow(1, 2, 3.0),)
    with Journal(path) as journal:
        journal.add(HessianRow(7, 8, 9.0))
    assert gpu_records.read_journal(path) == (HessianRow(1, 2, 3.0), HessianRow(7, 8, 9.0))


@given(error=st.one_of(st.none(), st.floats()), limit=st.floats(min_value=0, max_value=1))
def test_a_product_passes_only_within_its_limit(error: float | None, limit: float) -> None:
    row = KernelRow("k", "fp16", 1, 4, 1, error, limit)
    if error is None:
        assert row.outcome == "SKIP"
    else:
        assert (row.outcome == "PASS") == (not math.isnan(error) and error <= limit)


def test_figures_that_are_not_finite_survive(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    gpu_records.write(
        path,
        Records(
            (
                CARD,
                KernelRow("k", "fp16", 1, 4, 1, math.nan, 1.0),
                GemmRow("k", "fp16", 1, 4, 1, (math.inf,), None),
            )
        ),
    )
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = gpu_records.read(path)
    (row,) = found.of(KernelRow)
    assert found.of(GemmRow)[0].median == math.inf
    assert row.error is not None
    assert math.isnan(row.error)
    assert row.outcome == "FAIL"


def test_what_speaks_against_the_times_is_said() -> None:
    step = StepRow("gemm", "PASS", "")
    assert Records((CARD, step)).status == "VALID"
    assert Records((CARD, step)).reasons == ()
    busy = Records((CARD, replace(step, other_processes=("python, 4 GB",))))
    assert busy.status == "INVALID"
    assert busy.reasons == ("another process used the GPU: python, 4 GB",)
    hot = Records((CARD, replace(step, throttle_reasons=("HwThermalSlowdown",))))
    assert hot.status == "INVALID"
    assert hot.reasons == ("the GPU lowered its clock in step gemm: HwThermalSlowdown",)
    assert Records((step,)).status == "INVALID"
    rehearsed = Records((replace(CARD, device="cpu"), step))
    assert rehearsed.status == "REHEARSAL"
    assert "rehearsal" in rehearsed.reasons[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ("[]", "no list of rows"),
        ('{"format": 1}', "no list of rows"),
        ('{"format": 2, "rows": []}', "format 2; this version reads format 1"),
        ('{"format": 1, "rows": [3]}', "row 1: .*known kind: 3"),
        ('{"format": 1, "rows": [{"kind": "spam"}]}', "known kind"),
        ('{"format": 1, "rows": [{"kind": "hessian", "spam": 1}]}', "spam is not a known field"),
        ('{"format": 1, "rows": [{"kind": "hessian", "inputs": 1}]}', "tokens is missing"),
        (
            '{"format": 1, "rows": [{"kind": "hessian", "inputs": "x", "tokens": 1}]}',
            "inputs is 'x'",
        ),
        (
            '{"format": 1, "rows": [{"kind": "hessian", "inputs": 1, "tokens": 1, "seconds": []}]}',
            "seconds is",
        ),
        (
            '{"format": 1, "rows": [{"kind": "step", "step": "a", "outcome": "OK", "detail": ""}]}',
            "outcome is 'OK'",
        ),
    ],
)
def test_a_file_that_is_no_document_is_refused_with_the_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        gpu_records.read(path)
    assert str(path) in caught.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FileNotFoundError"):
        gpu_records.read(tmp_path / "missing.json")


def test_a_broken_line_within_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "hessian"\n{}\n')
    with pytest.raises(InputError, match="line 1"):
        gpu_records.read_journal(path)
