"""The picture of the README: every model of the comparison by perplexity and cost."""

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
_PERPLEXITIES = (*range(5, 20), *range(20, 40, 2), *range(40, 100, 10), *range(100, 1001, 100))


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
    room = 0.06 * (most - least) or 1.0
    low, high = least - room, most + room
    worst, best = max(row.perplexity for row in rows), min(row.perplexity for row in rows)
    above, below = log(worst * 1.06), log(best / 1.06)

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * _PANEL, 1)

    def down(perplexity: float) -> float:
        return round(top + (above - log(perplexity)) / (above - below) * _DEEP, 1)

    yield f'<text x="{left}" y="{top - 12}" fill="{_INK}" font-weight="bold">{title}</text>'
    for value in _apart([one for one in _PERPLEXITIES if below < log(one) < above], down):
        yield (
            f'<path d="M{left} {down(value)}h{_PANEL}" stroke="{_RULE}"/>'
            f'<text x="{left - 6}" y="{down(value) + 4}" text-anchor="end" fill="{_MUTED}">'
            f"{value}</text>"
        )
    for value in _ticks(low, high):
        yield (
            f'<text x="{across(value)}" y="{top + _DEEP + 14}" text-anchor="middle" '
            f'fill="{_MUTED}">{value}</text>'
        )
    yield (
        f'<text transform="translate({left - 36} {top + _DEEP / 2}) rotate(-90)" '
        f'text-anchor="middle" fill="{_MUTED}">perplexity</text>'
    )
    unbeaten = {row.name for row in front(rows, cost)}
    marks = [(across(one.cost), down(one.perplexity)) for one in found]
    # The lines of the cost intervals, which labels must not cross.
    lines = [
        Box(across(one.low), y - 1, across(one.high), y + 1)
        for one, (_, y) in zip(found, marks, strict=True)
    ]
    boxes = place(
        marks,
        [(len(row.weights) * _LETTER, _LINE) for row in rows],
        Box(left, top, left + _PANEL, top + _DEEP),
        radius=_RADIUS,
        free=lines,
    )
    for row, one, (x, y), box in zip(rows, found, marks, boxes, strict=True):
        colour = _COLOURS[row.runtime]
        if one.low < one.high:
            yield (
                f'<path d="M{across(one.low)} {y}H{across(one.high)}" stroke="{colour}" '
                'stroke-opacity="0.5"/>'
            )
        yield _mark(row, x, y, filled=row.name in unbeaten)
        yield from _name(row, x, y, box)


def _mark(row: Row, x: float, y: float, *, filled: bool) -> str:
    """Return a circle for dense, a square for cut out, a triangle for zeros."""
    colour = _COLOURS[row.runtime]
    style = f'fill="{colour if filled else "#fdfdfb"}" stroke="{colour}" stroke-width="1.5"'
    if not row.pruned:
        return f'<circle class="mark" cx="{x}" cy="{y}" r="4" {style}/>'
    if isinstance(parse(row.model), Structured):
        return f'<path class="mark" d="M{x - 4} {y - 4}h8v8h-8z" {style}/>'
    return f'<path class="mark" d="M{x} {y - 5}l5 9h-10z" {style}/>'


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
        "Filled: no model is better without being shown to cost more.",
        "Lines: 95 % intervals of the ratio to dense fp32.",
        "",
        f"{found.model}, {found.threads} threads of {machine.processor}.",
        f"A prompt of {found.prompt} tokens. {found.date}, {comparison.status}.",
        f"Perplexity on {found.text}.",
    ):
        yield f'<text x="{left}" y="{y}" fill="{_MUTED}">{escape(line)}</text>'
        y += 16


def _apart(values: Sequence[int], down: Callable[[float], float]) -> list[int]:
    """Return the values whose labels do not overlap."""
    kept: list[int] = []
    for value in values:
        if not kept or down(kept[-1]) - down(value) >= 1.6 * _FONT:
            kept.append(value)
    return kept


def _ticks(low: float, high: float) -> range:
    """Return round tick values between two limits: at most ten, usually four or more."""
    steps = (base * 10**power for power in range(6) for base in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= 10)
    return range(int(low // step + 1) * step, int(high) + 1, step)
