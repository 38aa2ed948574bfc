"""The options of `export` and `prune-export`, made from what the targets say of themselves."""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from exporters import targets
from exporters.options import Flag, flags
from exporters.target import Target
from thanos_deploy.bundle.layout import ONNX
from thanos_deploy.cli._types import CountsType, several

F = TypeVar("F", bound=Callable[..., Any])


def target_options(*, leave_out: Sequence[str] = ()) -> Callable[[F], F]:
    """`--target`, and every option that a target has.

    Args:
        leave_out: names of fields whose flags the command uses for something else.
    """
    takers: dict[str, list[Target[Any]]] = {}
    for target in targets.every():
        for name in flags(target.options):
            takers.setdefault(name, []).append(target)
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
    """The targets for --help, one line each."""
    every = targets.every()
    width = max(len(target.name) for target in every)
    return "\n".join(
        f"{target.name:{width}}  {target.summary}: OUT/{target.writes}" for target in every
    )


def _option(name: str, takers: Sequence[Target[Any]]) -> Callable[[F], F]:
    flag = flags(takers[0].options)[name]
    everyone = [target for target in targets.every() if flags(target.options)]
    whose = "" if takers == everyone else f"{', '.join(target.name for target in takers)}: "
    return click.option(
        flag.name, flag.keyword, type=_type(name, flag, takers), help=whose + flag.help
    )


def _type(name: str, flag: Flag, takers: Sequence[Target[Any]]) -> Any:
    """How the values of an option are read: from its type, and dtypes from the targets."""
    if name == "dtype":
        return click.Choice(list(dict.fromkeys(one for each in takers for one in each.dtypes)))
    hint = get_type_hints(takers[0].options)[name]
    plain = next(kind for kind in _members(hint) if kind is not type(None))
    if get_origin(plain) is Literal:
        return click.Choice(list(get_args(plain)))
    if flag.prefix is not None or get_origin(plain) is tuple:
        return CountsType()
    return plain


def _members(hint: Any) -> Iterator[Any]:
    """The types of a union, or the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        yield from get_args(hint)
    else:
        yield hint
