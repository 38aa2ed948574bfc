"""`thanos-deploy verify`: check a bundle's files against its records."""

from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import (
    bundle_argument,
    common_options,
    emit,
    progress_callback,
    session,
)


class Fraction(click.ParamType[float]):
    """A fraction between 0 and 1, or a percentage."""

    name = "fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read 0.8 or 80%; anything else is a usage error."""
        text = str(value)
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            self.fail(f"{text!r}: give a fraction between 0 and 1, such as 0.8 or 80%")
        return number


@click.command("verify")
@bundle_argument
@click.option(
    "--require-sparse",
    type=Fraction(),
    help="Fail (exit code 6) unless at least this fraction of the linear layers, such as 80%, is "
    "proven to run on sparse tensor cores in every engine.",
)
@click.option("--layers", is_flag=True, help="Print every linear layer of every engine.")
@common_options
def command(out: Path, require_sparse: float | None, layers: bool, **options: Any) -> None:
    """Check the bundle OUT from its files: hashes, patterns, and which layers run sparse.

    Exit codes: 6 a pattern does not hold or --require-sparse is not met, 7 a file is missing or
    changed.
    """
    with session(options) as announce:
        from thanos_deploy.cli._tables import show_checks, show_layers

        found = td.Bundle(out).verify(
            require_sparse=require_sparse, check=False, progress=progress_callback(announce)
        )
    emit(options, found, lambda value: show_checks(value.checks))
    if layers and not options["as_json"]:
        show_layers(found.engines)
    found.require()
