"""The options of `export` and `prune-export`, made from the declarations of the targets."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_origin

import click

from exporters import targets
from exporters.target import Target
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.cli._types import CountsType, several
from thanos_deploy.option import Option, options_by_name, options_of

F = TypeVar("F", bound=Callable[..., Any])


def target_options(*, leave_out: Sequence[str] = ()) -> Callable[[F], F]:
    """Return a decorator that adds `--target` and the options of all targets.

    Args:
        leave_out: names of option fields whose flags the command uses for something else.
    """
    takers: dict[str, list[Target[Any, Any]]] = {}
    for target in targets.every():
        for one in options_of(target.options):
            takers.setdefault(one.name, []).append(target)
    return several(
        click.option(
            "--target",
            type=click.Choice(targets.names()),
            default=ONNX,
            show_default=True,
            help="Target of the export.",
        ),
        *(_option(name, found) for name, found in takers.items() if name not in leave_out),
    )


def summaries() -> str:
    """Return one line for each target, for --help."""
    every = targets.every()
    width = max(len(target.name) for target in every)
    return "\n".join(
        f"{target.name:{width}}  {target.summary}: OUT/{target.writes}" for target in every
    )


def _option(name: str, takers: Sequence[Target[Any, Any]]) -> Callable[[F], F]:
    one = options_by_name(takers[0].options)[name]
    everyone = [target for target in targets.every() if options_of(target.options)]
    whose = "" if takers == everyone else f"{', '.join(target.name for target in takers)}: "
    return click.option(
        one.declared.flag, one.keyword, type=_type(one, takers), help=whose + one.declared.help
    )


def _type(option: Option, takers: Sequence[Target[Any, Any]]) -> Any:
    """Return the click type of an option; the choices of dtype are those of its targets."""
    if option.name == "dtype":
        return click.Choice(list(dict.fromkeys(one for each in takers for one in each.dtypes)))
    if option.choices:
        return click.Choice(option.choices)
    if option.declared.prefix is not None or get_origin(option.kind) is tuple:
        return CountsType()
    return option.kind
