"""Options: fields of frozen dataclasses that carry their flag, help text and range.

The default, the help text, the flag and the range of an option stand beside its field and nowhere
else. The command line builds its options from these fields, a report spells its commands with them,
and a manifest keeps their values. A value out of range is refused wherever the dataclass is built.

    @dataclass(frozen=True, slots=True)
    class Blocks(Options):
        columns: int = option(128, "--block-size", "Columns that are solved at once.", least=1)
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from thanos_deploy.bundle.codec import LATER
from thanos_deploy.errors import UsageError

_KEY = "thanos_deploy.option"


@dataclass(frozen=True, slots=True)
class Declared:
    """The description of an option in the metadata of its field.

    Attributes:
        flag: spelling of the option on the command line.
        help: text for `--help`.
        metavar: name of the value in `--help`; None for the name of the type.
        off: for a bool, the flag that switches it off; None if there is no such flag.
        least, most: inclusive lower and upper bound; None for no bound.
        above, below: exclusive lower and upper bound; None for no bound.
        prefix: for a list of numbers, the text before each number everywhere but on the command
            line: with "sm", `--sm 80,86` means ("sm80", "sm86").
    """

    flag: str
    help: str
    metavar: str | None = None
    off: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a dataclass.

    Attributes:
        name: name of the field.
        kind: type of the field, without None.
        default: default value.
        declared: flag, help text and range.
    """

    name: str
    kind: Any
    default: Any
    declared: Declared

    @property
    def keyword(self) -> str:
        """The flag as an identifier: `block_size` for `--block-size`."""
        return self.declared.flag.removeprefix("--").replace("-", "_")

    @property
    def choices(self) -> tuple[str, ...]:
        """The possible values of a `Literal`; empty for every other type."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def check(self, value: object) -> None:
        """Refuse a value that the option cannot have; None and tuples are not checked.

        Raises:
            UsageError: the value is none of the choices, or out of range.
        """
        said = self.declared
        if value is None or isinstance(value, tuple):
            return
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{said.flag} {value!r} is not one of the possible values",
                fix=f"use one of {', '.join(self.choices)}",
            )
        if isinstance(value, int | float) and not (
            (said.least is None or value >= said.least)
            and (said.most is None or value <= said.most)
            and (said.above is None or value > said.above)
            and (said.below is None or value < said.below)
        ):
            raise UsageError(
                f"{said.flag} {value:g} is out of range", fix=f"use a value {self._range}"
            )

    @property
    def _range(self) -> str:
        said = self.declared
        bounds = (
            ("of at least", said.least),
            ("above", said.above),
            ("of at most", said.most),
            ("below", said.below),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


class Options:
    """Base class of a set of options: a frozen dataclass whose fields are made by `option`.

    Raises:
        UsageError: a value is out of range; see `Option.check`.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        """Check the value of every option."""
        for one in options_of(type(self)):
            one.check(getattr(self, one.name))


def option(
    default: Any,
    flag: str,
    help: str,
    *,
    metavar: str | None = None,
    off: str | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    prefix: str | None = None,
    later: bool = False,
) -> Any:
    """Return a dataclass field that is an option; see `Declared`.

    Args:
        default: default value.
        flag, help, metavar, off, least, most, above, below, prefix: see `Declared`.
        later: whether there are records older than the option; see `codec.LATER`.
    """
    declared = Declared(flag, help, metavar, off, least, most, above, below, prefix)
    return field(default=default, metadata={_KEY: declared, **(LATER if later else {})})


_known: dict[type, tuple[Option, ...]] = {}


def options_of(cls: type) -> tuple[Option, ...]:
    """Return the options of a dataclass, in the order of its fields."""
    if cls not in _known:
        hints = get_type_hints(cls)
        _known[cls] = tuple(
            Option(one.name, _without_none(hints[one.name]), one.default, one.metadata[_KEY])
            for one in fields(cls)
            if _KEY in one.metadata
        )
    return _known[cls]


def options_by_name(cls: type) -> dict[str, Option]:
    """Return the options of a dataclass by the names of their fields."""
    return {one.name: one for one in options_of(cls)}


def chosen(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values that belong to the options of a dataclass.

    Args:
        cls: the dataclass.
        given: values by `Option.keyword`; options of other dataclasses may be among them.

    Returns:
        maps the name of a field to its value, for the options that are given.
    """
    return {one.name: given[one.keyword] for one in options_of(cls) if one.keyword in given}


def keywords(*classes: type) -> set[str]:
    """Return the keywords of the options of several dataclasses."""
    return {one.keyword for cls in classes for one in options_of(cls)}


def missing(cls: type) -> list[str]:
    """Return the names of the fields that are not options, or are options without a default."""
    declared = {one.name for one in options_of(cls) if one.default is not MISSING}
    return [one.name for one in fields(cls) if one.name not in declared]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        if len(kinds) == 1:
            return kinds[0]
    return hint
