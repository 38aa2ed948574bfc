"""A TensorRT-RTX engine, built ahead of time on any machine; see `exporters.tensorrt`."""

from functools import partial

from exporters.tensorrt import engine

# What the library builds for; it has no H100 (sm90) and no B200 (sm100).
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")

export = partial(engine.export, target="tensorrt-rtx")
