"""The libraries that build engines: TensorRT, and TensorRT for RTX."""

from dataclasses import dataclass

from exporters.packages import Package


@dataclass(frozen=True, slots=True)
class Library:
    """A library with TensorRT's Python interface.

    Attributes:
        target: name of the target that uses the library.
        package: Python package of the library.
        ahead_of_time: True if it builds on any machine for the GPUs that are named, and chooses
            kernels when the engine is loaded. False if it builds for the GPU of this machine, and
            times kernels on it.
    """

    target: str
    package: Package
    ahead_of_time: bool
