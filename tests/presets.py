"""Quick presets for tests; the shipped presets take minutes on a real model."""

from dataclasses import replace

from thanos_deploy.measure import fidelity
from thanos_deploy.methods import NO_TUNING, thanos
from thanos_deploy.shrink import options as cutting

TUNE_STEPS = 4

SHIPPED, SHIPPED_CUTS = dict(thanos.PRESETS), dict(cutting.PRESETS)


def make_quick() -> None:
    """Replace the shipped presets in this process by quick ones.

    Presets that set weights to zero tune with few steps, on the segments of the statistics alone.
    Presets that cut parts out do not tune. A dense model that is measured writes shorter texts,
    because it generates them one token at a time.
    """
    fidelity._WRITTEN = 32
    for name, preset in SHIPPED.items():
        if preset.walk.tune_steps:
            walk = replace(preset.walk, tune_steps=TUNE_STEPS, tune_nsamples=0)
            thanos.PRESETS[name] = replace(preset, walk=walk)
    for name, cut in SHIPPED_CUTS.items():
        cutting.PRESETS[name] = replace(cut, tuning=NO_TUNING)
