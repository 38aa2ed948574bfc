"""The table of the quantisation benchmark."""

from benchmarks import pages, quantisation
from benchmarks.quantisation import Results, Row, section


def test_every_grid_stands_beside_the_model_that_was_not_quantised() -> None:
    results = Results(
        calibration=(32, 512),
        evaluation=(4, 1024),
        processor="any",
        rows=(
            Row("dense", "none", "none", 20.0),
            Row("dense", "int4", "rounded", 25.0),
            Row("dense", "int4", "trained", 21.0, trained_on=49152),
            Row("2:4", "none", "none", 50.0),
            Row("2:4", "int8", "rounded", 49.9),
        ),
    )
    shown = section(results)
    assert "4 segments of 1024 tokens" in shown
    assert "scales trained on 49152 tokens" in shown
    assert shown.splitlines()[2:] == [
        "| pattern | grid | rounded | trained |",
        "|---|---|---:|---:|",
        "| dense | none | 20.00 | |",
        "| dense | int4 | 25.00 (+25.00 %) | 21.00 (+5.00 %) |",
        "| 2:4 | none | 50.00 | |",
        "| 2:4 | int8 | 49.90 (-0.20 %) |  |",
    ]


def test_the_page_says_what_the_results_say() -> None:
    page = quantisation.PAGE.read_text(encoding="utf-8")
    found = section(Results.read(quantisation.PUBLISHED))
    assert pages.rewritten(page, quantisation.COMMAND, found) == page, (
        f"run `{quantisation.COMMAND}`"
    )
