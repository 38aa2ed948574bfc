"""Parameter types of the options, and options made from the fields that declare them."""

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar, get_origin

import click

from thanos_deploy import pattern
from thanos_deploy.errors import PatternError
from thanos_deploy.option import Option, options_of

F = TypeVar("F", bound=Callable[..., Any])


class PatternType(click.ParamType[pattern.Pattern]):
    """A sparsity pattern on the command line."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> pattern.Pattern:
        """Parse a pattern; a bad spelling is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        try:
            return pattern.parse(value)
        except PatternError as error:
            self.fail(f"{error.message}; {error.fix}", param, ctx)


class CountsType(click.ParamType[tuple[int, ...]]):
    """A list of positive integers, separated by commas."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the numbers; anything else is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        numbers = value.split(",")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            self.fail(f"{value!r} is not a list of positive integers such as 1,8", param, ctx)
        return tuple(map(int, numbers))


def several(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Join option decorators into one; `--help` shows their options in this order."""
    return lambda command: reduce(lambda inner, wrap: wrap(inner), reversed(decorators), command)


def with_default(cls: type, field: str) -> Callable[[F], F]:
    """Return the option of one field of a dataclass, with the default of the field.

    Args:
        cls: dataclass that declares the option.
        field: name of the field.
    """
    (one,) = (one for one in options_of(cls) if one.name == field)
    return click.option(
        one.declared.flag,
        type=_type(one),
        default=one.default,
        show_default=True,
        metavar=one.declared.metavar,
        help=one.declared.help,
    )


def if_given(cls: type, *, default: str | None = None) -> Callable[[F], F]:
    """Return the options of a dataclass; see `unset` for the value of an option not given.

    Args:
        cls: dataclass that declares the options.
        default: text for --help that describes the default of all options; None for the default
            of each field.
    """
    return several(
        *(unset(one, one.declared.help, default or _said(one.default)) for one in options_of(cls))
    )


def unset(one: Option, help: str, default: str | None) -> Callable[[F], F]:
    """Return an option whose value is None, or an empty tuple if it takes many, unless given.

    Args:
        one: declaration of the option.
        help: its help text.
        default: text for --help that describes the default; None for no such text.
    """
    said = one.declared
    many = get_origin(one.kind) is tuple
    return click.option(
        f"{said.flag}/{said.off}" if said.off else said.flag,
        type=None if one.kind is bool else _type(one),
        is_flag=one.kind is bool,
        multiple=many,
        default=() if many else None,
        metavar=said.metavar,
        help=help if default is None else f"{help}  [default: {default}]",
    )


def _said(default: object) -> str | None:
    """Return a default as text; None if the option has no default."""
    return None if default in (None, (), "") else str(default)


def _type(one: Option) -> click.ParamType[Any] | type:
    """Return the click type of an option, with its choices or its range."""
    said = one.declared
    if one.choices:
        return click.Choice(one.choices)
    if one.kind in (int, float):
        bounds: dict[str, Any] = {
            "min": said.least if said.above is None else said.above,
            "max": said.most if said.below is None else said.below,
            "min_open": said.above is not None,
            "max_open": said.below is not None,
        }
        if bounds["min"] is None and bounds["max"] is None:
            kind: type = one.kind
            return kind
        return click.IntRange(**bounds) if one.kind is int else click.FloatRange(**bounds)
    return str
