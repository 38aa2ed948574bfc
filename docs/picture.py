"""The picture of the README: every model of the comparison by perplexity and cost.

Only the models of the front have a name beside their mark, because thirty names would hide the
marks; every mark has its name as a tooltip, and docs/choose.md has the table.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from math import log

from benchmarks.comparison.front import Cost, front, points
from benchmarks.comparison.record import Comparison, Row, read
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.report.labels import Box, place

# Sizes of the picture and of its panels, in SVG user units.
_WIDTH, _HEIGHT = 920, 760
_LEFT, _TOP, _PANEL, _DEEP, _GAP = 52, 34, 400, 300, 62
_FONT, _LETTER, _LINE = 10, 6.3, 13  # average letter width of the widest usual fonts
_RADIUS = 5.0

_INK, _MUTED, _RULE = "#1b1e24", "#59606b", "#d9dce1"
_COLOURS = {
    "ONNX Runtime": "#0a5a9c",
    "llama.cpp": "#b4530a",
    "OpenVINO": "#6a3d9a",
    "ORT-GenAI": "#2e7d32",
}
_TITLES: dict[Cost, str] = {
    "decode": "decode, ms per token",
    "prefill": "prefill of the prompt, ms",
    "size": "files, MB",
}
# Values that both logarithmic axes may show, as far as there is room.
_PERPLEXITIES = (*range(5, 20), *range(20, 40, 2), *range(40, 100, 10), *range(100, 1001, 100))
_COSTS = tuple(base * 10**power for power in range(6) for base in (1, 2, 3, 5, 7))


def draw() -> str:
    """Return the text of images/patterns.svg."""
    return svg(read())


def svg(comparison: Comparison) -> str:
    """Return the picture of a comparison: three panels, with the legend in the fourth place."""
    rows = comparison.rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="{_FONT}" role="img">',
        f"<title>Perplexity of {escape(comparison.conditions.model)}, dense and pruned, against "
        "decode time, prefill time and file size; lower left is better</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fdfdfb"/>',
    ]
    corners = _corners()
    for (cost, title), (left, top) in zip(_TITLES.items(), corners, strict=False):
        parts += _panel(left, top, title, rows, cost)
    parts += _key(*corners[-1], comparison)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _corners() -> list[tuple[int, int]]:
    """Return the upper left corners of the panels and of the legend."""
    return [
        (_LEFT + column * (_PANEL + _GAP), _TOP + row * (_DEEP + _GAP))
        for row in range(2)
        for column in range(2)
    ]


def _panel(left: int, top: int, title: str, rows: Sequence[Row], cost: Cost) -> Iterator[str]:
    found = points(rows, cost)
    least, most = min(one.low for one in found), max(one.high for one in found)
    low, high = log(least / 1.1), log(most * 1.1)
    worst, best = max(row.perplexity for row in rows), min(row.perplexity for row in rows)
    above, below = log(worst * 1.06), log(best / 1.06)

    def across(value: float) -> float:
        return round(left + (log(value) - low) / (high - low) * _PANEL, 1)

    def down(perplexity: float) -> float:
        return round(top + (above - log(perplexity)) / (above - below) * _DEEP, 1)

    yield f'<text x="{left}" y="{top - 12}" fill="{_INK}" font-weight="bold">{title}</text>'
    shown = [one for one in _PERPLEXITIES if below < log(one) < above]
    for value in _apart(shown, down, 1.6 * _FONT):
        yield (
            f'<path d="M{left} {down(value)}h{_PANEL}" stroke="{_RULE}"/>'
            f'<text x="{left - 6}" y="{down(value) + 4}" text-anchor="end" fill="{_MUTED}">'
            f"{value}</text>"
        )
    for value in _apart([one for one in _COSTS if low < log(one) < high], across, 4 * _FONT):
        yield (
            f'<text x="{across(value)}" y="{top + _DEEP + 14}" text-anchor="middle" '
            f'fill="{_MUTED}">{value}</text>'
        )
    yield (
        f'<text transform="translate({left - 36} {top + _DEEP / 2}) rotate(-90)" '
        f'text-anchor="middle" fill="{_MUTED}">perplexity</text>'
    )
    unbeaten = {row.name for row in front(rows, cost)}
    marks = {
        row.name: (across(one.cost), down(one.perplexity))
        for row, one in zip(rows, found, strict=True)
    }
    for row, one in zip(rows, found, strict=True):
        (x, y), filled = marks[row.name], row.name in unbeaten
        if one.low < one.high:
            yield (
                f'<path d="M{across(one.low)} {y}H{across(one.high)}" '
                f'stroke="{_COLOURS[row.runtime]}" stroke-opacity="0.5"/>'
            )
        yield _mark(row, x, y, filled=filled)
    best_rows = [row for row in rows if row.name in unbeaten]
    # Names must not cross the lines of the intervals, nor hide marks without a name.
    lines = [
        Box(across(one.low) - _RADIUS, y - _RADIUS, across(one.high) + _RADIUS, y + _RADIUS)
        for one, (_, y) in zip(found, marks.values(), strict=True)
    ]
    boxes = place(
        [marks[row.name] for row in best_rows],
        [(len(row.weights) * _LETTER, _LINE) for row in best_rows],
        Box(left, top, left + _PANEL, top + _DEEP),
        radius=_RADIUS,
        free=lines,
    )
    for row, box in zip(best_rows, boxes, strict=True):
        yield from _name(row, *marks[row.name], box)


def _mark(row: Row, x: float, y: float, *, filled: bool) -> str:
    """Return a circle for dense, a square for cut out, a triangle for zeros; with its name."""
    colour = _COLOURS[row.runtime]
    if not row.pruned:
        shape = f'circle cx="{x}" cy="{y}" r="4"'
    elif isinstance(parse(row.model), Structured):
        shape = f'path d="M{x - 4} {y - 4}h8v8h-8z"'
    else:
        shape = f'path d="M{x} {y - 5}l5 9h-10z"'
    return (
        f'<{shape} class="mark" fill="{colour if filled else "#fdfdfb"}" stroke="{colour}" '
        f'stroke-width="1.5"><title>{escape(row.name)}</title></{shape.split()[0]}>'
    )


def _name(row: Row, x: float, y: float, box: Box) -> Iterator[str]:
    """Yield the label of a point, and a leader line if the label is not beside the point."""
    if lead := box.lead(x, y, _RADIUS):
        yield (
            f'<path d="M{x} {y}L{round(lead[0], 1)} {round(lead[1], 1)}" '
            f'stroke="{_MUTED}" stroke-width="0.5"/>'
        )
    anchor, across = box.anchored(x)
    yield (
        f'<text class="name" x="{round(across, 1)}" y="{round(box.bottom - 3, 1)}" '
        f'text-anchor="{anchor}" fill="{_COLOURS[row.runtime]}">{escape(row.weights)}</text>'
    )


def _key(left: int, top: int, comparison: Comparison) -> Iterator[str]:
    runtimes = {row.runtime: None for row in comparison.rows}
    y = top
    for name in runtimes:
        yield f'<rect x="{left}" y="{y - 8}" width="10" height="10" fill="{_COLOURS[name]}"/>'
        yield f'<text x="{left + 18}" y="{y + 1}" fill="{_INK}">{name}</text>'
        y += 18
    found, machine = comparison.conditions, comparison.environment
    for line in (
        "",
        "Lower left is better.",
        "Circles: dense. Squares: heads and channels are cut out. Triangles: zeros.",
        "Filled and named: no model is better without being shown to cost more.",
        "Lines: 95 % intervals of the ratio to dense fp32.",
        "The names and figures of all marks are in docs/choose.md.",
        "",
        f"{found.model}, {found.threads} threads of {machine.processor}.",
        f"A prompt of {found.prompt} tokens. {found.date}, {comparison.status}.",
        f"Perplexity on {found.text}.",
    ):
        yield f'<text x="{left}" y="{y}" fill="{_MUTED}">{escape(line)}</text>'
        y += 16


def _apart(values: Sequence[int], at: Callable[[float], float], gap: float) -> list[int]:
    """Return the values whose labels are at least `gap` apart."""
    kept: list[int] = []
    for value in values:
        if not kept or abs(at(kept[-1]) - at(value)) >= gap:
            kept.append(value)
    return kept
