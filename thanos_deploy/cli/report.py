"""`thanos-deploy report`: write a report on a bundle, or on several side by side."""

from pathlib import Path

import click

import thanos_deploy as td
from thanos_deploy.cli._options import emit
from thanos_deploy.errors import UsageError


@click.command("report")
@click.argument(
    "bundles", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The page, FILE.html; FILE.md and FILE.json are written beside it.  [default: "
    "OUT/report/index.html, for one OUT]",
)
@click.option(
    "--allow-different-models",
    is_flag=True,
    help="Put bundles of different base models or tokenizers side by side.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
def command(
    bundles: tuple[Path, ...],
    output: Path | None,
    allow_different_models: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write one page about the bundles OUT: quality, speed, memory, size, and what is missing.

    The page is one file that loads nothing else, so it can be mailed, printed and opened from disk.

    \b
    thanos-deploy report out/smol
    thanos-deploy report out/two-four out/half out/shrunk -o compare.html
    """  # noqa: D301 - click wants the control character
    if output is None and len(bundles) > 1:
        raise UsageError(
            f"{len(bundles)} bundles without -o: a comparison is not written into any of "
            "the bundles",
            fix="give a file for the page, such as -o compare.html",
        )
    from thanos_deploy.cli._tables import show_report

    if output is not None:
        report = td.compare(
            bundles, output, allow_different_models=allow_different_models, overwrite=overwrite
        )
    else:
        (out,) = bundles
        report = td.Bundle(out).report()
    emit({"as_json": as_json}, report, show_report)
