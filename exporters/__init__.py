"""Exporters, one target per file: each module has one function `export`.

A new file is a new target; the command line finds it by its name. A file whose name begins with an
underscore is part of another one.
"""

import pkgutil


def names() -> list[str]:
    """Names of the targets, sorted."""
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    )
