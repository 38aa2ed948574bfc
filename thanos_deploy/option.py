"""Options: fields of frozen dataclasses that say how they are spelled and what they mean.

The default, the help text, the flag and the range of an option stand beside its field and nowhere
else. The command line makes its options from them, a report spells its commands with them, a
manifest keeps the values, and a value out of range is refused wherever the dataclass is built.

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
    """What a field's metadata says of an option.

    Attributes:
        flag: its spelling on the command line.
        help: what it means, for `--help`.
        metavar: the name of its value in `--help`; None for the name of the type.
        off: for a bool, the spelling of its opposite; None where it has none.
        least, most: the smallest and the largest value; None for no bound.
        above, below: bounds that are not themselves values.
        prefix: what each value of a list of numbers has before it everywhere but on the command
            line: "sm" for `--sm 80,86`, which means ("sm80", "sm86").
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
        name: of the field.
        kind: its type, without None.
        default: its default.
        declared: the rest.
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
        """The values that there are; none where they are not counted."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def check(self, value: object) -> None:
        """Refuse a value that the option does not have.

        Raises:
            UsageError: it is none of the choices, or out of range.
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
    """Base of a set of options, a frozen dataclass whose fields are made by `option`.

    Raises:
        UsageError: a value is out of range; see `Option.check`.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        """Refuse what no option has."""
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
    """A field of a dataclass that is an option; see `Declared`.

    Args:
        default: its default.
        flag, help, metavar, off, least, most, above, below, prefix: see `Declared`.
        later: there were records before there was the option; see `codec.LATER`.
    """
    declared = Declared(flag, help, metavar, off, least, most, above, below, prefix)
    return field(default=default, metadata={_KEY: declared, **(LATER if later else {})})


_known: dict[type, tuple[Option, ...]] = {}


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields."""
    if cls not in _known:
        hints = get_type_hints(cls)
        _known[cls] = tuple(
            Option(one.name, _without_none(hints[one.name]), one.default, one.metadata[_KEY])
            for one in fields(cls)
            if _KEY in one.metadata
        )
    return _known[cls]


def options_by_name(cls: type) -> dict[str, Option]:
    """The same by the names of the fields."""
    return {one.name: one for one in options_of(cls)}


def chosen(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of a dataclass's options.

    Args:
        cls: the dataclass.
        given: values by `Option.keyword`, of any options.

    Returns:
        values by the names of fields.
    """
    return {one.name: given[one.keyword] for one in options_of(cls) if one.keyword in given}


def keywords(*classes: type) -> set[str]:
    """The keywords of the options of dataclasses."""
    return {one.keyword for cls in classes for one in options_of(cls)}


def missing(cls: type) -> list[str]:
    """Fields of a dataclass that are no options, or have no default."""
    declared = {one.name for one in options_of(cls) if one.default is not MISSING}
    return [one.name for one in fields(cls) if one.name not in declared]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        if len(kinds) == 1:
            return kinds[0]
    return hint
