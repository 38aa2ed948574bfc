"""What values of options may be, and options made from the fields that declare them."""

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
        """Read the spelling; a bad one is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        try:
            return pattern.parse(value)
        except PatternError as error:
            self.fail(f"{error.message}; {error.fix}", param, ctx)


class CountsType(click.ParamType[tuple[int, ...]]):
    """A list of positive whole numbers, separated by commas."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read the numbers; anything else is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        numbers = value.split(",")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            self.fail(f"{value!r} is not a list of numbers from 1 on, like 1,8", param, ctx)
        return tuple(map(int, numbers))


def several(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Join several option decorators into one; `--help` shows them in this order."""
    return lambda command: reduce(lambda inner, wrap: wrap(inner), reversed(decorators), command)


def with_default(cls: type, field: str) -> Callable[[F], F]:
    """The option of one field of a dataclass; where it is not given, it has its default.

    Args:
        cls: the dataclass.
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
    """The options of a dataclass; those that are not given are None, or empty where many may be.

    Args:
        cls: the dataclass.
        default: what they are then, in words; None for the default of each field.
    """
    return several(
        *(unset(one, one.declared.help, default or _said(one.default)) for one in options_of(cls))
    )


def unset(one: Option, help: str, default: str | None) -> Callable[[F], F]:
    """An option that is None where it is not given, or empty where many may be given.

    Args:
        one: the option.
        help: what it means.
        default: what it is then, in words; None to say nothing of it.
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
    """A default in words, unless it is none."""
    return None if default in (None, (), "") else str(default)


def _type(one: Option) -> click.ParamType[Any] | type:
    """What click reads an option with."""
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
