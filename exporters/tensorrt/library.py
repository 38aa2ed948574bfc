"""The libraries that build engines: TensorRT, and TensorRT for RTX."""

from dataclasses import dataclass

from exporters.packages import Package


@dataclass(frozen=True, slots=True)
class Library:
    """A library with TensorRT's Python interface.

    Attributes:
        target: the name of the target that it builds for.
        package: its Python package.
        ahead_of_time: it builds on any machine for the GPUs that are named, and kernels are chosen
            when the engine is loaded there. Otherwise it builds on and for the GPU of this machine
            and times the kernels.
    """

    target: str
    package: Package
    ahead_of_time: bool
