"""Write the files of a report: into a bundle, or to a given path for a report on several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from thanos_deploy import __version__
from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage
from thanos_deploy.errors import UsageError
from thanos_deploy.report import build, card, markdown, page, sources
from thanos_deploy.report.model import FORMAT, Report
from thanos_deploy.report.sources import Sources


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Options of the stage report: format of report.json, and version of thanos-deploy."""

    format: str
    made_with: str


@dataclass(frozen=True, slots=True)
class ReportResult:
    """The part of a report that the manifest records."""

    headline: str
    notices: tuple[str, ...]


# A report reads the results of all other stages. Its inputs are therefore the time at which each
# of them finished, by name, and the hashes of the runs that belong to no stage.
REPORT: Stage[ReportOptions, dict[str, str], ReportResult] = Stage(
    layout.REPORT, ReportOptions, dict[str, str], ReportResult
)


def write_report(bundle: Bundle) -> Report:
    """Write the report and the model card from the finished stages; return the report.

    Raises:
        InputError: nothing was pruned yet, or a record is not readable.
        IntegrityError: a record was changed since it was written.
    """
    read = sources.read(bundle)

    def produce(folder: Path) -> ReportResult:
        content = build.build([read])
        (folder / layout.REPORT).mkdir()
        _write(content, [read], folder / layout.REPORT_PAGE, folder / layout.REPORT_TEXT)
        (folder / layout.CARD).write_text(card.write(content), encoding="utf-8")
        return ReportResult(content.headline, content.notices)

    bundle.run(
        REPORT,
        produce,
        options=ReportOptions(FORMAT, __version__),
        inputs={
            **{name: one.finished for name, one in bundle.stages.items() if name != REPORT.name},
            # An interrupted benchmark run belongs to no stage.
            **{name: files.sha256(bundle.path / name) for name in read.unrecorded},
        },
        overwrite=True,
    )
    return files.read_record(bundle.path / layout.REPORT_RECORD, Report)


def compare(
    bundles: Sequence[Path],
    destination: Path,
    *,
    allow_different_models: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write one report on some bundles, as HTML and, beside it, as Markdown and JSON.

    Args:
        bundles: folders of the bundles; nothing is written into them.
        destination: path of the HTML file.
        allow_different_models: see `build.build`.
        overwrite: replace existing files.

    Raises:
        UsageError: the bundles are of different models, the path does not end in .html, or a file
            exists already.
        InputError: nothing was pruned in a bundle yet, or a bundle cannot be read.
        IntegrityError: a record was changed since it was written.
    """
    _refuse(destination, overwrite)
    read = sources.share([sources.read(Bundle.open(path)) for path in bundles])
    content = build.build(read, allow_different_models=allow_different_models)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=destination.parent, prefix=".partial-") as partial:
        html = Path(partial) / destination.name
        _write(content, read, html, html.with_suffix(".md"))
        for path in sorted(html.parent.iterdir()):
            path.replace(destination.with_name(path.name))
    return content


def _refuse(destination: Path, overwrite: bool) -> None:
    if destination.suffix != ".html":
        raise UsageError(
            f"-o {destination}: the report is a page", fix="give a file name that ends in .html"
        )
    parent = destination.parent
    if parent.exists() and not parent.is_dir():
        raise UsageError(f"{parent} is a file", fix="give the path of a page in a folder with -o")
    for suffix in (".html", ".md", ".json"):
        path = destination.with_suffix(suffix)
        if path.is_dir() or (path.exists() and not overwrite):
            raise UsageError(
                f"{path} exists already", fix="give another file with -o, or --overwrite"
            )


def _write(report: Report, read: Sequence[Sources], html: Path, text: Path) -> None:
    """Write the page, the Markdown, and beside the Markdown the JSON."""
    html.write_text(page.render(report, read), encoding="utf-8")
    text.write_text(markdown.render(report), encoding="utf-8")
    files.write_record(text.with_suffix(".json"), report)
