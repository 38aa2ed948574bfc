"""The targets, one file each; `exporters.target.Target` describes what such a file defines.

To add a target, add a file with a `TARGET`: the command line, the pipeline, `verify`, `doctor` and
the report find it here.
"""

import pkgutil
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from exporters.target import Target
from thanos_deploy.errors import UsageError


def names() -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Target[Any, Any]:
    """Return a target by its name.

    Raises:
        UsageError: there is no such target; the message names similar ones.
        TypeError: its file does not keep the contract.
    """
    if name not in names():
        near = get_close_matches(name, names(), n=2) or names()
        raise UsageError(
            f"--target {name}: there is no such target", fix=f"use {' or '.join(near)}"
        )
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    found = getattr(module, "TARGET", None)
    if not isinstance(found, Target):
        raise TypeError(f"{module.__file__}: has no TARGET = Target(...)")
    if found.name != name:
        raise TypeError(f"{module.__file__}: its TARGET is called {found.name!r}")
    return found


def every() -> list[Target[Any, Any]]:
    """Return all targets, sorted by name."""
    return [get(name) for name in names()]


def of_stage(stage: str) -> Target[Any, Any] | None:
    """Return the target that owns a stage of a bundle; None for a stage that is no export."""
    owners = [target for target in every() if target.owns(stage)]
    return max(owners, key=lambda target: len(target.name), default=None)
