"""The options and the result of a finished stage as the dataclasses that they were written from."""

from typing import TypeVar

from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage

T = TypeVar("T")


def options_of(bundle: Bundle, stage: str, cls: type[T]) -> T:
    """What a finished stage was made with.

    Raises:
        InputError: the manifest says something else there.
    """
    return bundle.options(Stage(stage, cls, dict, dict))


def result_of(bundle: Bundle, stage: str, cls: type[T]) -> T:
    """What a finished stage reported.

    Raises:
        InputError: the manifest says something else there.
    """
    return bundle.result(Stage(stage, dict, dict, cls))
