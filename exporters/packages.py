"""Packages that are there on some machines only."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that a target needs.

    Attributes:
        module: what is imported.
        extra: the extra of thanos-deploy that installs it.
    """

    module: str
    extra: str

    @property
    def on_pypi(self) -> str:
        """The name on PyPI of a package that is called like its module."""
        return self.module.replace("_", "-")

    def load(self) -> ModuleType:
        """See `load`."""
        return load(self.module)


def load(name: str) -> ModuleType:
    """Import a package.

    Raises:
        ImportError, OSError: it or what it is linked against is missing. A folder of its name that
            happens to be on the path is not the package.
    """
    module = import_module(name)
    if module.__file__ is None:
        raise ImportError(f"No module named {name!r}")
    return module
