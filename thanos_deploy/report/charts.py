"""Charts of a report, as inline SVG that takes its colours and its font from the page.

Colours are drawn as placeholders, which are replaced by CSS variables at the end. So one chart
serves the light theme, the dark theme and print. Text stays text. No figure is in a chart alone:
each chart stands beside a table.
"""

import hashlib
import io
import logging
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from thanos_deploy.measure.run import DENSE, PRUNED, Run
from thanos_deploy.model.families import EXPERT
from thanos_deploy.pruning.result import PartBytes
from thanos_deploy.report.figures import metric_title
from thanos_deploy.report.labels import Anchor, Box, NoRoomError, place
from thanos_deploy.report.model import LayerMap, Plot, PlotPoint

# matplotlib logs messages about its caches, which do not concern the user.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# Placeholder colour -> CSS variable of the page.
_INK, _MUTED, _LINE, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent"}

_STYLE = mpl.RcParams(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "thanos-deploy",  # the same picture gets the same bytes
        "text.parse_math": False,  # a name may have a dollar sign
        "font.family": "DejaVu Sans",  # comes with matplotlib; only measures text
        "font.size": 9.0,
        "text.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "axes.titlecolor": _INK,
        "axes.titlesize": 9.0,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
        "ytick.labelcolor": _MUTED,
        "legend.frameon": False,
    }
)
_WIDTH = 7.2  # inches of 72 SVG units
_LONGEST = 32  # characters of the longest name that is shown whole
_NAME = 8.0  # font size of the name of a point
_NAME_LINE, _BELOW = 1.3 * _NAME, 0.3 * _NAME  # height of its line, and depth below the baseline
_RADIUS = 5.0  # units around a point that names leave free
_ALIGNMENTS: dict[Anchor, Literal["left", "center", "right"]] = {
    "start": "left",
    "middle": "center",
    "end": "right",
}

# The dense model is dashed as well as grey, so that colour alone does not tell the two apart.
_LINES: dict[str, tuple[str, Any]] = {DENSE: (_MUTED, (0, (3, 2))), PRUNED: (_ACCENT, "solid")}
_OTHERS: tuple[tuple[int, tuple[int, ...]], ...] = ((0, (1, 1)), (0, (5, 1, 1, 1)), (0, (5, 2)))


@mpl.rc_context(_STYLE)
def ratios(run: Run) -> Markup:
    """Draw the time ratio to the dense model with its confidence interval, for each scenario."""
    rows = [
        (metric_title(scenario, metric), ratio)
        for scenario, metric, ratio in run.ratios
        if metric != "tokens_per_second"  # the only metric where more is better
    ]
    figure, axes = _figure(0.28 * len(rows) + 0.7)
    for height, (_, ratio) in enumerate(reversed(rows)):
        differs = ratio.high < 1.0 or ratio.low > 1.0
        axes.plot([ratio.low, ratio.high], [height] * 2, color=_ACCENT, linewidth=1.6)
        axes.plot(
            ratio.estimate,
            height,
            marker="o",
            markersize=5,
            color=_ACCENT,
            fillstyle="full" if differs else "none",
        )
    axes.axvline(1.0, color=_MUTED, linewidth=1.0, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time, pruned / dense (1 is the dense model; left of it is faster)")
    return _svg(
        figure, "Time of the pruned model as a fraction of the dense model's, with intervals"
    )


@mpl.rc_context(_STYLE)
def distributions(run: Run) -> Markup:
    """Draw the cumulative distributions of the raw samples of the baseline and the pruned model."""
    panels = [
        (scenario, metric)
        for scenario in run.scenarios
        for metric in next(iter(scenario.results.values())).metrics
        if metric != "tokens_per_second"  # follows from the time of the whole answer
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_WIDTH, 1.75 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    pair = [name for name in run.subjects if name in (run.baseline, PRUNED)]
    subjects = pair if len(pair) > 1 else list(run.subjects)
    others = iter(_OTHERS * len(subjects))
    lines = {name: _LINES.get(name) or (_INK, next(others)) for name in subjects}
    for axes, (scenario, metric) in zip(grid, panels, strict=False):
        for name, (colour, style) in lines.items():
            samples = sorted(scenario.results[name].metrics[metric].samples)
            axes.step(
                [1e3 * seconds for seconds in (samples[0], *samples)],
                [index / len(samples) for index in range(len(samples) + 1)],
                where="post",
                color=colour,
                linestyle=style,
                linewidth=1.4,
                label=_brief(name),
            )
        axes.set_title(f"{metric_title(scenario, metric).replace(', ', chr(10))}, ms")
        axes.set_yticks([0.0, 0.5, 0.9, 1.0], ["0", "50 %", "90 %", ""])
        axes.locator_params(axis="x", nbins=4)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(lines))
    return _svg(figure, "Share of the samples that took at most a given time, for each scenario")


@mpl.rc_context(_STYLE)
def layer_maps(layers: LayerMap) -> Markup:
    """Draw two heat maps, error and removed fraction, with blocks down and layers across."""
    columns, rows = layers.columns, len(layers.error)
    figure = Figure(figsize=(_WIDTH, 0.125 * rows + 1.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    worst = max(cell for row in layers.error for cell in row if cell is not None)
    for axes, values, most, title in (
        (left, layers.error, worst, f"Relative error of the output (strongest: {worst:.2%})"),
        (right, layers.gone, 1.0, "Share that was removed (strongest: 100 %)"),
    ):
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if value is None:
                    continue
                shade = 0.05 + 0.95 * value / most if most else 0.05
                axes.add_patch(
                    Rectangle((column, row), 0.94, 0.9, facecolor=to_rgba(_ACCENT, shade))
                )
        axes.set(xlim=(0, len(columns)), ylim=(rows, 0), title=title)
        axes.set_xticks(
            [column + 0.5 for column in range(len(columns))],
            [_label(name) for name in columns],
            rotation=35,
            ha="right",
        )
        step = max(1, rows // 10)
        axes.set_yticks([row + 0.5 for row in range(0, rows, step)], range(0, rows, step))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    left.set_ylabel("block")
    return _svg(figure, "Error and share of zeros of every linear layer, block by block")


def _label(layer: str) -> str:
    """Return the last part of a layer's name, and whether it belongs to experts."""
    own = layer.rpartition(".")[2]
    return f"{own} (experts)" if EXPERT in layer.split(".") else own


@mpl.rc_context(_STYLE)
def sizes(parts: PartBytes) -> Markup:
    """Draw the bytes of the checkpoint by part, for the dense and the pruned model."""
    figure, axes = _figure(1.45)
    both = {PRUNED: parts.pruned, DENSE: parts.dense}
    names = [name for name in parts.dense if any(sizes[name] for sizes in both.values())]
    for number, name in enumerate(names):
        shade = to_rgba(_ACCENT, 1.0 - 0.85 * number / max(1, len(names) - 1))
        for height, (who, sizes) in enumerate(both.items()):
            before = sum(sizes[other] for other in names[:number])
            axes.barh(
                height,
                sizes[name] / 1e6,
                left=before / 1e6,
                height=0.6,
                color=shade,
                edgecolor=_ACCENT,
                linewidth=0.6,
                label=name if who == DENSE else None,
            )
    axes.set_yticks((0, 1), (PRUNED, DENSE))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("checkpoint, MB")
    figure.legend(loc="outside lower left", ncols=len(names))
    return _svg(figure, "Size of the checkpoint by part, dense and pruned")


@mpl.rc_context(_STYLE)
def pareto(plots: Sequence[Plot]) -> Markup:
    """Draw perplexity against each cost; filled points are on the front, hollow ones dominated.

    The chart grows in height until no name overlaps another name or a point.
    """
    height = 3.0
    while True:
        try:
            figure = _panels(plots, height)
        except NoRoomError:
            height *= 1.25
        else:
            return _svg(figure, "Perplexity against time and size; lower left is better")


def _panels(plots: Sequence[Plot], height: float) -> Figure:
    """Draw one panel for each cost, two in a row.

    Raises:
        NoRoomError: a panel of this height, in inches, has no room for the names of its points.
    """
    rows = -(-len(plots) // 2)
    # Names are placed in pixels, which at this resolution are the units of the SVG.
    figure = Figure(figsize=(_WIDTH, height * rows), layout="constrained", dpi=72)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, plot in zip(grid, plots, strict=False):
        scale = _scale(plot)
        for point in plot.points:
            beaten, colour = bool(point.dominated_by), _colour(point)
            axes.errorbar(
                point.cost * scale,
                point.perplexity,
                xerr=[
                    [scale * (point.cost - point.low)],
                    [scale * (point.high - point.cost)],
                ],
                fmt="o" if point.valid else "x",
                markersize=5,
                color=colour,
                markerfacecolor="none" if beaten else colour,
                elinewidth=1.0,
            )
        front = sorted(
            (point.cost * scale, point.perplexity)
            for point in plot.points
            if not point.dominated_by
        )
        axes.plot(*zip(*front, strict=True), color=_LINE, linewidth=1.0, zorder=0)
        axes.margins(0.12)
        axes.set_title(f"{plot.cost}, {'MB' if plot.unit == 'B' else plot.unit}")
    for axes in grid[len(plots) :]:
        axes.set_axis_off()
    for axes in grid[::2]:
        axes.set_ylabel("perplexity")
    figure.draw_without_rendering()  # computes the layout, which places the panels
    figure.set_layout_engine("none")
    for axes, plot in zip(grid, plots, strict=False):
        _add_names(figure, axes, plot)
    return figure


def _add_names(figure: Figure, axes: Axes, plot: Plot) -> None:
    """Add the name of each point to a panel, with a line to the point if it is far away."""
    scale, panel = _scale(plot), axes.bbox

    def at(cost: float, perplexity: float) -> tuple[float, float]:
        x, y = axes.transData.transform((cost * scale, perplexity))
        return float(x), -float(y)  # y grows downwards, unlike matplotlib's

    names = [
        figure.text(0, 0, _brief(point.label), color=_colour(point), fontsize=_NAME, transform=None)
        for point in plot.points
    ]
    marks = [at(point.cost, point.perplexity) for point in plot.points]
    boxes = place(
        marks,
        [(min(name.get_window_extent().width, panel.width), _NAME_LINE) for name in names],
        Box(panel.x0, -panel.y1, panel.x1, -panel.y0),
        radius=_RADIUS,
        free=[
            Box(at(point.low, 0)[0], y - 1, at(point.high, 0)[0], y + 1)
            for point, (_, y) in zip(plot.points, marks, strict=True)
        ],
    )
    for name, (x, y), box in zip(names, marks, boxes, strict=True):
        if lead := box.lead(x, y, _RADIUS):
            figure.add_artist(
                Line2D((x, lead[0]), (-y, -lead[1]), color=_MUTED, linewidth=0.5, transform=None)
            )
        anchor, across = box.anchored(x)
        name.set_horizontalalignment(_ALIGNMENTS[anchor])
        name.set_position((across, -box.bottom + _BELOW))


def _scale(plot: Plot) -> float:
    return 1e-6 if plot.unit == "B" else 1.0


def _colour(point: PlotPoint) -> str:
    return _MUTED if point.dominated_by or point.label == DENSE else _ACCENT


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _brief(name: str) -> str:
    """Shorten a long name to its beginning and its end, since names differ there."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 2]}…{name[1 - _LONGEST // 2 :]}"


def _svg(figure: Figure, title: str) -> Markup:
    """Return a figure as an SVG element for an HTML page, with a title for screen readers."""
    drawn = io.StringIO()
    with warnings.catch_warnings():
        # The browser has the glyphs that DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            drawn,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style .*?</style>", r"<!--.*?-->"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = _own_names(svg, f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}")
    head, _, content = svg.partition(">")
    found = re.search(r'viewBox="([^"]+)"', head)
    assert found
    return Markup(f'<svg role="img" viewBox="{found[1]}"><title>{escape(title)}</title>{content}')


def _own_names(svg: str, prefix: str) -> str:
    """Drop ids that nothing refers to, and make the others unique on the page by a prefix."""
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]+)"', rename, svg)
    return re.sub(r'(href="#|url\(#)([\w-]+)', rf"\1{prefix}-\2", svg)
