"""The libraries that build engines: TensorRT, and TensorRT for RTX."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Library:
    """A library with TensorRT's Python interface.

    Attributes:
        target: the name of the target that it builds for.
        module: its Python package; the one on PyPI has hyphens for underscores.
        ahead_of_time: it builds on any machine for the GPUs that are named, and kernels are chosen
            when the engine is loaded there. Otherwise it builds on and for the GPU of this machine
            and times the kernels.
    """

    target: str
    module: str
    ahead_of_time: bool

    @property
    def package(self) -> str:
        """The name on PyPI."""
        return self.module.replace("_", "-")

    def load(self) -> Any:
        """The module.

        Raises:
            ImportError, OSError: it or what it is linked against is missing.
        """
        return import_module(self.module)
