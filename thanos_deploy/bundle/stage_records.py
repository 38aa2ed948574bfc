"""The options and the result of a finished stage as the dataclasses that they were written from."""

from typing import TypeVar

from thanos_deploy.bundle.codec import decode
from thanos_deploy.bundle.manifest import MANIFEST, Bundle
from thanos_deploy.errors import InputError

T = TypeVar("T")


def options_of(bundle: Bundle, stage: str, cls: type[T]) -> T:
    """What a finished stage was made with.

    Raises:
        InputError: the manifest says something else there.
    """
    return _decoded(bundle, stage, "options", cls)


def result_of(bundle: Bundle, stage: str, cls: type[T]) -> T:
    """What a finished stage reported.

    Raises:
        InputError: the manifest says something else there.
    """
    return _decoded(bundle, stage, "result", cls)


def _decoded(bundle: Bundle, stage: str, part: str, cls: type[T]) -> T:
    try:
        return decode(cls, getattr(bundle.stages[stage], part))
    except ValueError as error:
        raise InputError(
            f"{bundle.path / MANIFEST}: stages.{stage}.{part}: {error}",
            fix="repeat the command that made the stage with --overwrite",
        ) from error
