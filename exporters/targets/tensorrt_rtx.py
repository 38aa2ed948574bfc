"""TensorRT-RTX: an engine that is built ahead of time, on any machine."""

from exporters.packages import Package
from exporters.tensorrt import contract
from exporters.tensorrt.library import Library

LIBRARY = Library("tensorrt-rtx", Package("tensorrt_rtx", extra="rtx"), ahead_of_time=True)

# The GPUs that the library builds for; it supports neither H100 (sm90) nor B200 (sm100).
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")


TARGET = contract.target(
    LIBRARY,
    summary="an engine for the GPUs of --sm, built on any machine",
    gpu=False,
    architectures=lambda bundle, asked: asked or ARCHITECTURES,
)
