"""Checks of arguments and translation of errors, for every public function.

The command line refuses a value outside its choices or its range before anything runs. The API does
the same from the annotations of its functions: `Literal` lists choices, and `Range` gives a range.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Unpack, get_args, get_origin

from thanos_deploy.errors import UsageError, translate_system_error

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, repr=False)
class Range:
    """The numbers from `low` to `high`; no upper bound if `high` is None.

    `low` itself is excluded if `open_low` is true.
    """

    low: float
    high: float | None = None
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (self.high is None or value <= self.high)

    def __repr__(self) -> str:
        high = "" if self.high is None else f", {self.high:g}"
        return f"Range({self.low:g}{high}{', open_low=True' if self.open_low else ''})"

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
        return start if self.high is None else f"{start} to {self.high:g}"


Positive = Annotated[int, Range(1)]


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of the API: check its arguments and translate its errors.

    The decorated function raises:
        UsageError: an argument is outside its choices or its range.
        TypeError: there is no such argument.
        DeployError: see the function; errors of the system, such as a full disk, are translated.
    """
    signature = inspect.signature(function)
    known = dict(parameters(function))

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given |= given.pop("options", {})
        for name in known.keys() & given.keys():
            _check(name, given[name], known[name])
        with translated():
            return function(*args, **kwargs)

    return checked


def parameters(function: Callable[..., object]) -> Iterator[tuple[str, Any]]:
    """Yield the name and annotation of each argument; `**options: Unpack[...]` is expanded."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert get_origin(parameter.annotation) is Unpack
            (options,) = get_args(parameter.annotation)
            yield from inspect.get_annotations(options).items()
        elif parameter.name != "self":
            yield parameter.name, parameter.annotation


@contextmanager
def translated() -> Iterator[None]:
    """Translate an error of the system that a user can fix into a `DeployError`."""
    try:
        yield
    except Exception as error:
        if known := translate_system_error(error):
            raise known from error
        raise


def _check(name: str, value: object, annotation: Any) -> None:
    """Refuse a value that is outside the choices or the range of its annotation."""
    if value is None:
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(
                f"{name}: {value!r} is not one of the possible values",
                fix=f"give one of {', '.join(map(str, arguments))}",
            )
    elif origin is Annotated:
        for limit in annotation.__metadata__:
            if isinstance(limit, Range) and value not in limit:  # type: ignore[operator]
                raise UsageError(f"{name} {value!r}: out of range", fix=f"give a number {limit}")
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, str):
            raise UsageError(
                f"{name} {value!r}: a single text instead of a list",
                fix="give a list, even for a single entry",
            )
        for entry in value:  # type: ignore[attr-defined]
            _check(name, entry, arguments[0])
    elif origin is not None and not (isinstance(origin, type) and issubclass(origin, Mapping)):
        # A union, usually with None, which was handled above: check against its one other member
        # that has choices, a range or entries.
        others = [one for one in arguments if get_origin(one) in (Literal, Annotated) or _many(one)]
        if len(others) == 1:
            _check(name, value, others[0])


def _many(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not tuple
