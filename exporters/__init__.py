"""Exporters, one target per file: each module has one function `export`.

A new file is a new target; the command line finds it by its name.
"""

import pkgutil

_NOT_TARGETS = ("options", "preflight")


def names() -> list[str]:
    """Names of the targets, sorted."""
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(__path__)
        if module.name not in _NOT_TARGETS
    )
