"""Optional packages, which are installed on some machines only."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that a target needs.

    Attributes:
        module: name of the module to import.
        extra: the extra of thanos-deploy that installs it.
    """

    module: str
    extra: str

    @property
    def on_pypi(self) -> str:
        """Name on PyPI; right only for packages that are named like their module."""
        return self.module.replace("_", "-")

    def load(self) -> ModuleType:
        """See `load`."""
        return load(self.module)


def load(name: str) -> ModuleType:
    """Import a package.

    Raises:
        ImportError, OSError: the package or a library that it is linked against is missing. An
            unrelated folder of the same name on the path counts as missing.
    """
    module = import_module(name)
    if module.__file__ is None:
        raise ImportError(f"No module named {name!r}")
    return module
