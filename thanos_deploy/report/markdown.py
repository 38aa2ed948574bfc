"""The report as Markdown: the sentences and tables of the page, without its charts."""

from collections.abc import Iterable, Iterator, Sequence

from thanos_deploy.bundle.engine_record import BuildRecord
from thanos_deploy.measure.run import Run
from thanos_deploy.pruning.budget import DECISION_COLUMNS, decision_cells, decision_rows
from thanos_deploy.report import words
from thanos_deploy.report.escape import code, code_block, literal, quote
from thanos_deploy.report.figures import figures, metric_title, shown, shown_ratio
from thanos_deploy.report.model import ModelReport, Report
from thanos_deploy.report.runs import quoted


def render(report: Report) -> str:
    """Return a report as Markdown."""
    models = report.models
    blocks = [
        f"# {literal(report.title)}",
        literal(report.headline),
        *(f"> **{literal(notice)}**" for notice in report.notices),
    ]
    if len(models) > 1:
        blocks += ["## Side by side", *_comparison(report)]
    for model in models:
        if len(models) > 1:
            blocks.append(f"## {literal(model.label)}")
        blocks += _model(model)
    blocks.append(f"Made by thanos-deploy {report.made_with}.")
    return "\n\n".join(blocks) + "\n"


def _comparison(report: Report) -> Iterator[str]:
    for plot in report.pareto:
        yield f"Perplexity against {plot.cost}"
        yield _table(
            ("model", "perplexity", plot.unit if plot.unit != "B" else "MB", "dominated by"),
            (
                (
                    point.label,
                    f"{point.perplexity:.2f}",
                    shown(point.cost, "B")
                    if plot.unit == "B"
                    else f"{point.cost:.3f}" + ("" if point.valid else " (not VALID)"),
                    ", ".join(point.dominated_by) or "none",
                )
                for point in plot.points
            ),
        )


def _model(model: ModelReport) -> Iterator[str]:
    yield _table(
        ("", "dense", "pruned", "pruned / dense"),
        (
            (
                figure.title,
                shown(figure.dense, figure.unit),
                shown(figure.pruned, figure.unit),
                shown_ratio(figure),
            )
            for figure in figures(model)
        ),
    )
    yield "\n".join(f"- {literal(sentence)}" for sentence in model.verdict)
    if choices := model.choices:
        yield "### What pruning each group of layers saves and changes"
        yield _table(DECISION_COLUMNS, map(decision_cells, decision_rows(choices)))
    for run in model.bench:
        yield f"### Run {literal(run.run)}: {run.status}"
        yield _scenarios(run)
    yield "### Sparse kernels"
    if (export := model.export) and export.weights_on_pattern is not None:
        yield (
            f"In the exported graph, read back from the file, {model.pattern} holds in "
            f"{export.weights_on_pattern} of {export.weights} weights."
        )
    yield "\n".join(map(_kernels, model.kernels)) or (
        f"No engine was built. {literal(words.on_gpu(model))}"
    )
    if parts := model.parts:
        yield "### Where the bytes are"
        yield _table(
            ("part", "dense, MB", "pruned, MB"),
            (
                (part, shown(dense, "B"), shown(parts.pruned[part], "B"))
                for part, dense in parts.dense.items()
            ),
        )
    if sample := model.sample:
        yield f"### What they write after: {literal(sample.prompt)}"
        for who, text in sample.texts.items():
            yield f"{literal(who)}:\n\n{quote(text)}"
    yield "### What was not measured"
    yield "\n".join(
        f"- {literal(gap.what)}: {literal(gap.why)}"
        + (f"; {code(gap.command)}" if gap.command else "")
        for gap in model.not_measured
    )
    yield "### How to do it again"
    yield "\n".join(map(code_block, model.commands))
    spoken_for = quoted(model)
    environment = spoken_for.environment if spoken_for else model.environment
    yield (
        f"Model: {literal(model.source.name)}, SHA-256 {model.source.sha256}. Machine: "
        f"{literal(environment.processor)}, {environment.cores} cores."
    )


def _kernels(build: BuildRecord) -> str:
    summary = build.summary
    return (
        f"- {literal(build.target)}: {summary.picked} of {summary.layers} layers were given "
        f"a sparse kernel, {summary.eligible} were eligible."
    )


def _scenarios(run: Run) -> str:
    return _table(
        ("scenario", "model", "median", "p90", "p99", f"ratio to {run.baseline}"),
        (
            (
                metric_title(scenario, name) + (", 1/s" if metric.unit == "1/s" else ", ms"),
                subject,
                *(shown(one, metric.unit) for one in (metric.median, metric.p90, metric.p99)),
                f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                if (ratio := times.ratio.get(name))
                else "",
            )
            for scenario in run.scenarios
            for subject, times in scenario.results.items()
            for name, metric in times.metrics.items()
        ),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    return "\n".join(
        f"| {' | '.join(map(literal, line))} |" if number != 1 else f"|{'|'.join(line)}|"
        for number, line in enumerate([*lines, *rows])
    )
