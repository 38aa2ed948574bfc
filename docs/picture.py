"""The picture of the README: what each pattern costs in quality and brings in time and size."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "benchmarks" / "results" / "comparison-runtimes.json"

# Of the whole picture and of its three panels, in SVG's units.
_WIDTH, _HEIGHT = 900, 412
_LEFT, _TOP, _PANEL, _GAP, _DEEP = 56, 34, 258, 28, 300
_LABEL = 90  # width of the longest name without int8
_DENSE, _ZEROS, _CUT = "#59606b", "#b4530a", "#0a5a9c"


@dataclass(frozen=True, slots=True)
class Point:
    """A model in one panel.

    Attributes:
        model: as the command line spells its pattern, with int8 where its weights are.
        cost: milliseconds or megabytes.
        low, high: the ends of the 95 % interval of the cost; the cost itself where it is exact.
        perplexity: on the text of the comparison.
    """

    model: str
    cost: float
    low: float
    high: float
    perplexity: float

    @property
    def colour(self) -> str:
        """One for the dense model, one for zeros, one for smaller matrices."""
        if self.model.startswith("dense"):
            return _DENSE
        return _CUT if self.model.startswith("structured") else _ZEROS


def draw() -> str:
    """images/patterns.svg."""
    rows = json.loads(FIGURES.read_bytes())["rows"]
    panels = (
        ("decode after 128 tokens, ms", [_timed(row, rows[0], "decode-1x128") for row in rows]),
        ("prefill of 128 tokens, ms", [_timed(row, rows[0], "prefill-1x128") for row in rows]),
        ("ONNX file, MB", [_sized(row) for row in rows]),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11" role="img">',
        "<title>Perplexity of SmolLM2-135M-Instruct by pattern, against decode time, prefill time "
        "and file size; lower left is better</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fdfdfb"/>',
        f'<text transform="translate(14 {_TOP + _DEEP / 2}) rotate(-90)" text-anchor="middle" '
        'fill="#1b1e24">perplexity</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 30}" fill="#59606b">Lower left is better. Grey: dense. '
        "Orange: weights are zeros. Blue: heads and channels are cut out.</text>",
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}" fill="#59606b">Squares: int8 weights. Lines: 95 % '
        "intervals of the ratio to the dense model, where they were measured.</text>",
    ]
    for number, (title, points) in enumerate(panels):
        parts += _panel(_LEFT + number * (_PANEL + _GAP), title, points)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _timed(row: dict[str, Any], dense: dict[str, Any], scenario: str) -> Point:
    found, baseline = (one["onnxruntime"][scenario] for one in (row, dense))
    cost, unit = found["median_seconds"] * 1e3, baseline["median_seconds"] * 1e3
    ratio = found["ratio"]
    low, high = (ratio["low"] * unit, ratio["high"] * unit) if ratio else (cost, cost)
    return Point(_name(row["model"]), cost, low, high, row["perplexity"])


def _sized(row: dict[str, Any]) -> Point:
    size = row["onnx_bytes"] / 1e6
    return Point(_name(row["model"]), size, size, size, row["perplexity"])


def _name(model: str) -> str:
    """A pattern as the command line spells it, from the name of its folder."""
    name = model.removesuffix("-int8")
    name = {"2-4": "2:4"}.get(name, name.replace("-", ":"))
    return name if name == model or "int8" not in model else f"{name}, int8"


def _panel(left: float, title: str, points: Sequence[Point]) -> Iterator[str]:
    low, high = min(one.low for one in points), max(one.high for one in points)
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)

    def across(cost: float) -> float:
        return round(left + (cost - low) / (high - low) * _PANEL, 1)

    def down(perplexity: float) -> float:
        return round(_TOP + (18.0 - perplexity) / 8.0 * _DEEP, 1)

    yield f'<text x="{left}" y="{_TOP - 14}" fill="#1b1e24">{title}</text>'
    for value in range(10, 19, 2):
        yield (
            f'<path d="M{left} {down(value)}h{_PANEL}" stroke="#d9dce1"/>'
            f'<text x="{left - 6}" y="{down(value) + 4}" text-anchor="end" fill="#59606b">'
            f"{value}</text>"
        )
    for value in _ticks(low, high):
        yield (
            f'<text x="{across(value)}" y="{_TOP + _DEEP + 16}" text-anchor="middle" '
            f'fill="#59606b">{value}</text>'
        )
    for one in points:
        x, y, colour = across(one.cost), down(one.perplexity), one.colour
        if one.low < one.high:
            yield f'<path d="M{across(one.low)} {y}H{across(one.high)}" stroke="{colour}"/>'
        yield (
            f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8" fill="{colour}"/>'
            if one.model.endswith("int8")
            else f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>'
        )
        yield _label(one, x, y, left)


def _label(point: Point, x: float, y: float, left: float) -> str:
    """The name of a point, where it meets no other: below those that were cut, above the others."""
    int8 = point.model.endswith("int8")
    cut = point.model.startswith("structured") and not int8
    before = not int8 and x - left > (_LABEL if cut else _PANEL / 2)
    return (
        f'<text x="{x + 4 if before else x - 4}" y="{y + 16 if cut else y - 8}" '
        f'text-anchor="{"end" if before else "start"}" fill="{point.colour}">{point.model}</text>'
    )


def _ticks(low: float, high: float) -> range:
    """Round numbers of which four to eight lie between two."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if (high - low) / step <= 8)
    return range(int(low // step + 1) * step, int(high) + 1, step)
