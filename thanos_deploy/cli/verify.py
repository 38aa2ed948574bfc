"""`thanos-deploy verify`: is everything that a bundle says of itself true?"""

from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import bundle_argument, common_options, emit, session
from thanos_deploy.errors import GateError, IntegrityError


class Fraction(click.ParamType[float]):
    """A fraction, written as such or in per cent."""

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
    help="Fail (exit code 6) unless at least that fraction of the linear layers is proven to run "
    "on sparse tensor cores, such as 80%, in every engine.",
)
@click.option("--layers", is_flag=True, help="Print every linear layer of every engine.")
@common_options
def command(out: Path, require_sparse: float | None, layers: bool, **options: Any) -> None:
    """Check the bundle OUT from its bytes on: hashes, patterns, and which layers run sparse.

    Exit codes: 6 a pattern or a demand is missed, 7 a file is missing or changed.
    """
    with session(options) as announce:
        from thanos_deploy.bundle.manifest import Bundle
        from thanos_deploy.cli._tables import show_checks, show_layers
        from thanos_deploy.stages import verify

        bundle = Bundle.open(out)
        checks = verify.verify(
            bundle, require_sparse=require_sparse, on_progress=announce("Look at every file again")
        )
        result = verify.verification(checks, bundle)
    emit(options, result, lambda found: show_checks(found.checks))
    if layers and not options["as_json"]:
        show_layers(result.engines)
    for check in checks:
        if check.outcome == "FAIL":
            kind = IntegrityError if check.name.endswith(": files") else GateError
            raise kind(f"{check.name}: {check.detail}", fix=check.fix)
