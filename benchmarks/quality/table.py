"""The results in Markdown: perplexity of every row, and the other quality measures."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev

from scipy import stats

from benchmarks.quality.record import Judged, Results, Row
from thanos_deploy.measure.quality import Answers
from thanos_deploy.measure.run import Interval

PATTERNS = ("unstructured:0.5", "2:4", "structured:0.3")

_LEVEL = 0.95

# SmolLM2-135M-Instruct (dequantised Q4_1), calibrated on the first 100 documents of a C4 sample,
# joined (32 segments of 512 tokens). Perplexity is on the first 8 segments of 2048 tokens of
# WikiText-2's test split; dense 19.13. Measured with the published code of each method, on two
# x86-64 cores. Each row has the name, the perplexity for each of `PATTERNS`, and the seconds of the
# whole prune call.
PUBLISHED: tuple[tuple[str, tuple[str, str, str], str], ...] = (
    ("magnitude", ("415", "1678", "5.6e6"), "4 to 11"),
    ("Wanda", ("42.3", "150.6", "2785"), "82 to 110"),
    ("SparseGPT, published code", ("40.5", "82.6", "475"), "185 to 261"),
    ("SparseGPT, llm-compressor 0.14", ("40.5", "", ""), "212 (1 thread)"),
    ("Thanos, published code, B = 128", ("38.2", "81.2", "234"), "617 and 329 of CPU"),
    ("Thanos, published code, alpha = 0.1", ("", "", "212"), ""),
)
_PUBLISHED_OF = "SmolLM2-135M-Instruct"


def section(results: Results) -> str:
    """Return both tables of one model, with their conditions."""
    said, machine = results.conditions, results.environment
    published = said.model.startswith(_PUBLISHED_OF)
    parts = [
        f"Perplexity of {said.model}, {said.eval_segments} segments of {said.eval_seqlen} tokens; "
        f"{results.dense.perplexity:.2f} before pruning. Structured patterns are columns of zeros "
        "unless the row says that they are cut out. Seconds are of the whole call, in the order of "
        f"the columns; the first row was measured on {machine.cores} cores of {machine.processor}."
        f"{' Published code is in italics.' if published else ''}",
        "\n".join(_perplexities(results, published=published)),
    ]
    if examined := [row for row in results.rows if row.judged.quality is not None]:
        parts += [
            f"What else {said.model} loses, on the same text, with 95 % intervals (see "
            "[Evaluate](evaluate.md)):",
            "\n".join(_others(results.dense, examined)),
        ]
    return "\n\n".join(parts) + "\n"


def _perplexities(results: Results, *, published: bool) -> Iterator[str]:
    measured = dict.fromkeys(row.pattern for row in results.rows)
    usual = [pattern for pattern in PATTERNS if published or pattern in measured]
    patterns = list(dict.fromkeys((*usual, *measured)))
    yield _line(["method, preset", *patterns, "seconds"])
    yield _line(["---", *["---:"] * len(patterns), "---:"])
    for name in dict.fromkeys(row.way for row in results.rows):
        found = [
            [row for row in results.rows if (row.way, row.pattern) == (name, pattern)]
            for pattern in patterns
        ]
        seconds = ", ".join(f"{rows[0].seconds:.0f}" if rows else "-" for rows in found)
        yield _line([name, *map(_cell, found), seconds])
    if published:
        further = [""] * (len(patterns) - len(PATTERNS))
        for name, values, taken in PUBLISHED:
            yield _line([f"*{name}*", *values, *further, taken])


def _cell(rows: Sequence[Row]) -> str:
    """Return the perplexity with the first calibration segments, and with drawn ones."""
    said = [_shown(row.judged.perplexity) for row in rows if row.seed is None]
    drawn = [row for row in rows if row.seed is not None]
    if len(drawn) > 1:
        found = interval([row.judged.perplexity for row in drawn])
        said.append(
            f"{len(drawn)} draws: {_shown(found.estimate)} "
            f"({_shown(found.low)} to {_shown(found.high)})"
        )
    else:
        said += [f"draw {row.seed}: {_shown(row.judged.perplexity)}" for row in drawn]
    return "; ".join(said)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of some draws, with its confidence interval by Student's t distribution.

    Args:
        values: values of the draws; at least two.
    """
    half = stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean(values), mean(values) - half, mean(values) + half, _LEVEL)


def _others(dense: Judged, rows: Sequence[Row]) -> Iterator[str]:
    yield _line(
        [
            "method, preset",
            "pattern",
            "divergence, nats per token",
            "same most likely token",
            "last words right",
            "multiple choice right",
            "tokens of the dense model's text before the first difference",
        ]
    )
    yield _line(["---", "---", *["---:"] * 5])
    if dense.quality is not None:
        answers = [_answers(dense.quality.words), _answers(dense.quality.choices)]
        yield _line(["dense", "", "", "", *answers, ""])
    for row in rows:
        if (quality := row.judged.quality) is None:
            continue
        near = quality.fidelity
        yield _line(
            [
                row.way if row.seed is None else f"{row.way}, draw {row.seed}",
                row.pattern,
                "" if near is None or near.divergence is None else f"{near.divergence:.3f}",
                "" if near is None else f"{100 * near.agreement:.1f} %",
                _answers(quality.words),
                _answers(quality.choices),
                "" if near is None else f"{near.before_first:.1f} of {near.tokens}",
            ]
        )


def _answers(found: Answers | None) -> str:
    if found is None:
        return ""
    one = found.accuracy
    return f"{100 * one.estimate:.1f} % ({100 * one.low:.1f} to {100 * one.high:.1f})"


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
