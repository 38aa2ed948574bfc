"""Convert frozen dataclasses to JSON and back, checked field by field.

Every record that this project writes is a frozen dataclass, and only this module converts records
to and from JSON. A field may be a bool, int, float, str, None, a `Literal`, a `Path`, another
dataclass, a homogeneous or fixed tuple, a sequence (read as a tuple), a mapping from str or int, or
a union of these. Floats that JSON lacks are written as "nan", "inf" and "-inf".

The metadata of a field can change its form in JSON: see `LATER`, `OTHERS` and `called`.
"""

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Json = dict[str, Any]

# Metadata of a field that is left out of the JSON while it has its default. It is for fields that
# were added later, so that older records and new records with the default are the same.
LATER: Mapping[str, object] = {"thanos_deploy.later": True}

# Metadata of a field, a mapping, that holds every entry whose name is no other field's. A dataclass
# has at most one. It is for records whose entries vary, such as the options of a method.
OTHERS: Mapping[str, object] = {"thanos_deploy.others": True}

_CALLED = "thanos_deploy.called"

_NOT_FINITE = ("nan", "inf", "-inf")


def called(name: str) -> Mapping[str, object]:
    """Return metadata for a field whose name in JSON is `name`, which is no Python identifier."""
    return {_CALLED: name}


class UnknownFormatError(ValueError):
    """A record has a format that this version cannot read."""


def loads(content: bytes | str, **options: Any) -> Any:
    """Read JSON from an untrusted source, as `json.loads` does.

    Args:
        content: the JSON text.
        options: options of `json.loads`.

    Raises:
        ValueError: the text is not JSON, or is nested deeper than Python's parser supports.
    """
    try:
        return json.loads(content, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode(value: object) -> Json:
    """Convert a dataclass or a mapping to a JSON object; fields keep the order of their definition.

    Raises:
        TypeError: a value in it has no form in JSON.
    """
    if isinstance(value, Mapping):
        return {str(key): _encoded(entry) for key, entry in value.items()}
    assert is_dataclass(value)
    assert not isinstance(value, type)
    written: Json = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        if _says(field, OTHERS):
            written |= encode(entry)
        elif not (_says(field, LATER) and entry == _default(field)):
            written[_name(field)] = _encoded(entry)
    return written


def decode(cls: type[T], value: object) -> T:
    """Convert a JSON value to a dataclass, or to any other type that a field may have.

    Raises:
        ValueError: a field is missing, unknown, or of another type; the message names its place,
            such as `layers[3].rows`, and the value found there.
    """
    found: T = _decoded(cls, value, "")
    return found


def decode_format(cls: type[T], value: object, known: int | str) -> T:
    """Decode a record whose field `format` must have the value `known`.

    Raises:
        UnknownFormatError: the field has another value.
        ValueError: see `decode`.
    """
    found = value.get("format") if isinstance(value, dict) else None
    if found != known:
        raise UnknownFormatError(f"format {found!r}; this version reads {known!r}")
    return decode(cls, value)


def _encoded(value: object) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, tuple | list):
        return [_encoded(entry) for entry in value]
    if isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        return encode(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _decoded(hint: Any, value: object, place: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, place)
    if hint is Any:
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(hint, value, place)
    if origin in (tuple, Sequence) and isinstance(value, list):
        kinds = list(_kinds(origin, arguments, len(value)))
        if len(kinds) == len(value):
            return tuple(
                _decoded(kind, entry, f"{place}[{index}]")
                for index, (kind, entry) in enumerate(zip(kinds, value, strict=True))
            )
    if (origin is not None and issubclass(_class(origin), Mapping)) and isinstance(value, dict):
        prefix = f"{place}." if place else ""
        return {
            _key(arguments[0], key, place): _decoded(arguments[1], entry, f"{prefix}{key}")
            for key, entry in value.items()
        }
    if hint is float and (value in _NOT_FINITE or _is_number(value)):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError as error:
            raise _unfit(value, place) from error
    if _is_plain(hint, value, origin, arguments):
        return Path(value) if hint is Path else value  # type: ignore[arg-type]
    raise _unfit(value, place)


def _key(hint: Any, key: str, place: str) -> str | int:
    """Convert a key of a mapping; in JSON, numbers are text there."""
    if hint is not int:
        return key
    try:
        return int(key)
    except ValueError as error:
        raise _unfit(key, f"a key of {place or 'the record'}") from error


def _is_plain(hint: Any, value: object, origin: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the value matches a type whose JSON form is the value itself, or a path's text."""
    if origin is Literal:
        return value in arguments
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return (hint is type(None) and value is None) or (
        hint in (str, Path) and isinstance(value, str)
    )


def _one_of(hints: tuple[Any, ...], value: object, place: str) -> Any:
    """Decode with the first member of a union that accepts the value.

    `float` is tried last, so that integers stay integers.
    """
    seen = _unfit(value, place)
    for hint in sorted(hints, key=lambda hint: hint is float):
        try:
            return _decoded(hint, value, place)
        except ValueError as error:
            if is_dataclass(hint) and isinstance(value, dict):
                seen = error
    raise seen


def _record(cls: type, value: object, place: str) -> Any:
    if not isinstance(value, dict):
        raise _unfit(value, place)
    prefix = f"{place}." if place else ""
    known = _fields(cls)
    others = {name: entry for name, entry in value.items() if name not in known}
    rest = _rest(cls)
    if others and rest is None:
        raise ValueError(f"{prefix}{min(others)} is not a known field")
    given = {}
    for name, (attribute, hint, required) in known.items():
        if name in value:
            given[attribute] = _decoded(hint, value[name], f"{prefix}{name}")
        elif required:
            raise ValueError(f"{prefix}{name} is missing")
    if rest is not None:
        attribute, hint = rest
        given[attribute] = _decoded(hint, others, place)
    return cls(**given)


@cache
def _fields(cls: type) -> dict[str, tuple[str, Any, bool]]:
    """Map the name of each field in JSON to (attribute, type, whether it has no default)."""
    hints = get_type_hints(cls)
    return {
        _name(field): (
            field.name,
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(cls)
        if not _says(field, OTHERS)
    }


@cache
def _rest(cls: type) -> tuple[str, Any] | None:
    """Return the attribute and the type of the field with metadata `OTHERS`, if there is one."""
    hints = get_type_hints(cls)
    found = [field.name for field in fields(cls) if _says(field, OTHERS)]
    return (found[0], hints[found[0]]) if found else None


def _name(field: "Field[Any]") -> str:
    return str(field.metadata.get(_CALLED, field.name))


def _says(field: "Field[Any]", metadata: Mapping[str, object]) -> bool:
    return metadata.items() <= field.metadata.items()


def _default(field: "Field[Any]") -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _class(origin: Any) -> type:
    return origin if isinstance(origin, type) else object


def _kinds(origin: Any, arguments: tuple[Any, ...], length: int) -> Iterator[Any]:
    """Yield the type of each entry of a tuple or sequence with this number of entries."""
    if origin is Sequence or arguments[1:] == (Ellipsis,):
        yield from arguments[:1] * length
    else:
        yield from arguments


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unfit(value: object, place: str) -> ValueError:
    return ValueError(f"{place or 'the record'} is {str(value)[:60]!r}")
