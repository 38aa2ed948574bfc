"""The results in Markdown."""

from benchmarks.comparison.front import COSTS, front, sentence, shown
from benchmarks.comparison.record import Comparison, Row, Times

_HEADS = (
    *("model", "weights", "runtime", "perplexity", "decode, ms", "prefill, ms", "files, MB"),
    "best in",
)


def section(comparison: Comparison) -> str:
    """Return the conditions, a sentence about each front, and a table of the rows."""
    rows = comparison.rows
    best = {cost: {row.name for row in front(rows, cost)} for cost in COSTS}
    lines = [
        _line(_HEADS),
        _line(("---", "---", "---", *["---:"] * 4, "---")),
        *(
            _line(_cells(row, ", ".join(cost for cost in COSTS if row.name in best[cost])))
            for row in rows
        ),
    ]
    return "\n\n".join(
        (
            conditions(comparison),
            "\n".join(f"- {sentence(rows, cost)}" for cost in COSTS),
            "\n".join(lines) + "\n",
        )
    )


def conditions(comparison: Comparison) -> str:
    """Say what was measured, on which machine, and whether the times count."""
    found, machine = comparison.conditions, comparison.environment
    status: str = comparison.status
    if comparison.reasons:
        status += f" ({'; '.join(comparison.reasons)})"
    return (
        f"{found.model} on {found.threads} threads of {machine.processor}, {found.date}, "
        f"{status}, by `{found.command}` of that day. All took turns, {found.rounds} rounds of a "
        f"prompt of {found.prompt} tokens and {found.new_tokens} after it. Times are medians, with "
        "the ratio to the first row's and its 95 % interval. Perplexity of each is by "
        f"{found.judge}, on {found.segments} segments of {found.length} tokens of {found.text}."
    )


def headline(comparison: Comparison) -> str:
    """Return the sentence about decode, as a summary for the README."""
    return sentence(comparison.rows, "decode") + "\n"


def _cells(row: Row, best: str) -> tuple[str, ...]:
    way = "" if row.way == "exact" else f", {row.way}"
    return (
        *(row.model, f"{row.bits}{way}", row.runtime, f"{row.perplexity:.2f}"),
        *(_time(row.decode), _time(row.prefill)),
        *(shown(row, "size").removesuffix(" MB"), best),
    )


def _time(times: Times) -> str:
    median, ratio = f"{times.median * 1e3:.1f}", times.ratio
    if ratio is None:
        return median
    return f"{median}, {ratio.estimate:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
