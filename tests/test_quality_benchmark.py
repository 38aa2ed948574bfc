"""benchmarks.quality: a run on a tiny model, and the tables."""

import argparse
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.quality import __main__ as quality
from benchmarks.quality.record import Conditions, Judged, Results, Row
from benchmarks.quality.table import interval, section
from thanos_deploy.machine import environment
from thanos_deploy.measure.quality import TextQuality
from thanos_deploy.model.checkpoint import Checkpoint


def results(*rows: Row, model: str = "tiny") -> Results:
    """Of a made-up model."""
    conditions = Conditions(model, "0" * 64, "0" * 64, "0" * 64, 2, 64)
    return Results(conditions, environment.describe(), Judged(10.0), rows)


def row(way: str, pattern: str, perplexity: float, seed: int | None = None) -> Row:
    """Of a made-up way."""
    return Row(way, pattern, {}, Judged(perplexity), 1.0, seed=seed)


def test_the_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    # The 97.5 % quantile for two degrees of freedom is 4.302653.
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)
    )


def test_draws_stand_beside_the_first_segments() -> None:
    shown = section(
        results(
            row("a", "2:4", 12.0),
            *(row("a", "2:4", value, seed) for seed, value in enumerate((11.0, 12.0, 13.0))),
            row("a", "unstructured:0.5", 11.5),
            row("b", "2:4", 1e6, seed=0),
        )
    )
    assert "| a | 11.50 | 12.00; 3 draws: 12.00 (9.52 to 14.48) | 1, 1 |" in shown
    assert "| b |  | draw 0: 1e+06 | -, 1 |" in shown
    assert "ublished code" not in shown
    assert "ublished code" in section(results(model="SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_the_page_says_what_the_results_say() -> None:
    page = quality.PAGE.read_text(encoding="utf-8")
    found = pages.rewritten(page, quality.COMMAND, quality.published())
    assert found == page, f"run `{quality.COMMAND}`"


def test_a_row_is_measured_once(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog near the old mill. " * 20)
    arguments = argparse.Namespace(
        model=str(tiny_llama),
        settings=[{"pattern": "2:4", "preset": "fast", "nsamples": 2, "seqlen": 32, "recover": 1}],
        seeds=[],
        nsamples=2,
        seqlen=32,
        questions=4,
        results=tmp_path / "results",
        models=tmp_path / "models",
        calib=text,
        eval_text=text,
        eval_segments=2,
        eval_seqlen=64,
    )
    (first,) = quality.measured(arguments).rows
    assert (first.way, first.pattern, first.seed) == (
        "thanos, fast, nsamples 2, seqlen 32, recover 1",
        "2:4",
        None,
    )
    found = first.judged.quality
    assert isinstance(found, TextQuality)
    assert first.judged.perplexity == pytest.approx(found.value, abs=0.005)
    assert found.fidelity is not None
    assert found.choices is not None
    (kept,) = arguments.models.iterdir()
    assert Checkpoint.open(kept).weights.tensors
    assert {path.name for path in arguments.results.iterdir() if path.is_dir()} == set()
    arguments.seeds = [3]
    again, drawn = quality.measured(arguments).rows
    assert again == first
    assert drawn.seed == 3
    assert "draw 3" in section(results(drawn))
    arguments.eval_segments = 1
    with pytest.raises(SystemExit, match="under other conditions"):
        quality.measured(arguments)
