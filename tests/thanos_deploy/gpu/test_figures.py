"""What is said of GPUs is what the files say: in the package, docs/gpu.md, reports and plans."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_figures as publishing
from benchmarks import pages
from tests.gpu_rows import CARD, RECORDS, ROWS
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.figures import figures, from_json, sentences, to_json
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import StepRow
from thanos_deploy.pattern import parse


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if that run had been published."""
    found = figures(RECORDS)
    assert found is not None
    monkeypatch.setattr(gpu_figures, "published", lambda: (found,))


def test_each_pass_is_the_fastest_engine_beside_the_fastest_dense_one() -> None:
    found = figures(RECORDS)
    assert found is not None
    assert (found.card, found.date, found.reasons) == ("H100", "2026-11-30", ())
    two_four, cut = found.passes
    assert (two_four.model, two_four.name, two_four.removed) == ("2:4", "decode-1x512", 0.0)
    assert (two_four.engine, two_four.dense_engine) == ("torch:sparse", "torch:eager")
    assert two_four.speed == pytest.approx(5e-3 / 2.5e-3)
    assert (cut.model, cut.removed) == ("structured", 0.25)
    assert cut.speed == pytest.approx(1.25)


def test_each_product_is_the_fastest_kernel_beside_the_dense_one() -> None:
    found = figures(RECORDS)
    assert found is not None
    (product,) = found.products
    assert (product.outputs, product.inputs, product.tokens) == (14336, 4096, 1)
    assert (product.kernel, product.dtype) == ("triton", "bf16")
    assert product.speed == pytest.approx(40 / 25)


def test_a_rehearsal_shows_nothing() -> None:
    assert figures(Records((replace(CARD, device="cpu"), *ROWS[1:]))) is None
    assert figures(Records(())) is None


def test_what_is_published_is_what_was_worked_out() -> None:
    found = figures(RECORDS)
    assert found is not None
    assert from_json(to_json([found])) == (found,)


def test_a_sentence_names_card_date_command_and_figures(measured: None) -> None:
    (said,) = sentences(parse("2:4"))
    for part in ("H100", "2026-11-30", "`python -m benchmarks.gpu_campaign`", "8.0 billion"):
        assert part in said
    assert "decode-1x512 took 2.50 ms on torch:sparse, dense 5.00 ms on torch:eager" in said
    assert "so 2.00x as fast" in said
    assert "25% of the parameters cut out" in " ".join(sentences(parse("structured:0.3")))
    assert [*sentences(parse("2:4"), card="H100")] == [said]
    for nothing in ("4:8", "unstructured:0.5"):
        assert [*sentences(parse(nothing))] == []
    assert [*sentences(parse("2:4"), card="A100")] == []


def test_a_run_that_does_not_count_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = StepRow("models", "PASS", "", other_processes=("process 7, 4.0 GB",))
    found = figures(Records((*ROWS, busy)))
    assert found is not None
    monkeypatch.setattr(gpu_figures, "published", lambda: (found,))
    assert "That run is INVALID (another process used the GPU" in next(sentences(parse("2:4")))
    text = publishing.section([Records((*ROWS, busy))])
    assert "INVALID" in text
    assert "- another process used the GPU: process 7, 4.0 GB" in text


def test_the_page_has_a_table_for_each_kind_of_figure() -> None:
    text = publishing.section([RECORDS])
    for line in (
        "**H100**, 2026-11-30, `python -m benchmarks.gpu_campaign` (driver 580.1, PyTorch 2.11, "
        "Triton 3.6, transformers 5.17): VALID.",
        "It copied 3.00 TB/s and multiplied 8192^3 in bf16 at 700 TFLOP/s.",
        "| 2:4, bf16 | decode-1x512 | 5.00 (torch:eager) | 2.50 (torch:sparse) | 2.00 |",
        "| 14336 x 4096, bf16 | 1 | 40.0 | 25.0 (triton) | 1.60 |",
        "| 4096 x 14336 | 2:4 | thanos, fast | 2.50 |",
    ):
        assert line in text
    assert publishing.section([]) == "On a GPU: not measured (no GPU).\n"


def test_the_page_and_the_package_say_what_the_files_say() -> None:
    runs = gpu_records.read_all(publishing.RESULTS)
    page = publishing.PAGE.read_text(encoding="utf-8")
    how = "run `python -m benchmarks.gpu_figures`"
    found = pages.rewritten(page, publishing.COMMAND, publishing.section(runs))
    assert found == page, how
    assert publishing.SUMMARY.read_text(encoding="utf-8") == publishing.summary(runs), how
    assert len(gpu_figures.published()) == sum(figures(run) is not None for run in runs)


def test_both_are_written_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "gpu"
    results.mkdir()
    gpu_records.write(results / "h100.json", RECORDS)
    monkeypatch.setattr(publishing, "RESULTS", results)
    for name in ("PAGE", "SUMMARY"):
        monkeypatch.setattr(publishing, name, tmp_path / name)
    publishing.PAGE.write_text("".join(pages.marks(publishing.COMMAND)))
    publishing.main()
    assert "**H100**" in publishing.PAGE.read_text()
    assert from_json(publishing.SUMMARY.read_text()) == (figures(RECORDS),)
