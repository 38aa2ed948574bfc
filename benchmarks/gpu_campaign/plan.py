"""The steps in their order, with the sizes for a GPU and for a rehearsal."""

from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.gpu_campaign import gpu_tests, onnxruntime, rehearsal, sanitizer
from thanos_deploy.gpu_check import card, kernels, models, pruning, walks
from thanos_deploy.gpu_check.kernels import KERNELS, Grid
from thanos_deploy.gpu_check.steps import Step
from thanos_deploy.measure.latency import Decode, Prefill


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that each step works on."""

    peaks: card.Sizes = field(default_factory=card.Sizes)
    correctness: Grid = kernels.CORRECTNESS
    gemm: Grid = field(default_factory=Grid)
    model: models.Sizes = field(default_factory=models.Sizes)
    layers: pruning.Sizes = field(default_factory=pruning.Sizes)
    walk: walks.Sizes = field(default_factory=walks.Sizes)


# Usual seconds of a kernel's steps, if not `_A_KERNEL`: Triton compiles and tunes, cuSPARSELt
# searches its algorithms, and CUDA C++ is compiled.
_CORRECTNESS = {"triton": 50.0, "mma-sp": 6.0}
_GEMM = {"triton": 25.0, "mma-sp": 8.0, "cusparselt": 14.0, "cusparselt-first": 14.0}
_A_KERNEL = 8.0

# Usual seconds of a model's step. With 2:4, the fastest kernel of each layer is measured first.
_MODEL = {"dense": 12.0, "2:4": 42.0, "structured": 10.0, "structured, 2:4": 36.0}

# Usual seconds of a step in a rehearsal, on a machine that does other work as well.
_REHEARSED = 60.0

_TOY_MODEL = models.Sizes(
    hidden=64,
    channels=128,
    heads=8,
    kv_heads=4,
    head_size=8,
    blocks=2,
    vocabulary=300,
    dtype="fp32",
)

# Small sizes that have every kind of tile edge that the sizes for a GPU have.
TOY = Sizes(
    peaks=card.Sizes(copy_bytes=1 << 16, gemm=32, samples=2),
    # One shape has enough columns for blocks that share a tile, and 70 tokens suffice for wgmma.
    correctness=Grid(shapes=((37, 148), (8, 516)), tokens=(1, 17, 70), dtypes=("fp16", "bf16")),
    gemm=Grid(shapes=((8, 128),), tokens=(1, 16), dtypes=("bf16",), samples=2),
    model=replace(
        _TOY_MODEL,
        dtype="bf16",
        scenarios=(Decode(1, 8, 4), Decode(4, 8, 4), Prefill(1, 16), Prefill(2, 8)),
        turns=1,
        warmup=1,
    ),
    layers=pruning.Sizes(layers=((16, 64), (64, 32)), compared=64, hessian=(32, 256)),
    walk=walks.Sizes(model=_TOY_MODEL, segments=(4, 32), compared=_TOY_MODEL),
)


def steps(command: str, *, rehearse: bool) -> list[Step]:
    """Return all steps.

    Args:
        command: command that repeats the measurement.
        rehearse: run on a CPU with toy sizes; steps then have no requirements.
    """
    sizes = TOY if rehearse else Sizes()
    sparse = ("gpu", "sparse")
    found = [
        Step("card", 5, partial(card.rows, command), ("gpu",), always=True),
        Step("peaks", 8, partial(card.peak_rows, sizes.peaks), ("gpu",)),
        *(
            Step(
                f"correctness:{kernel}",
                _CORRECTNESS.get(kernel, _A_KERNEL),
                partial(kernels.correctness, kernel, sizes.correctness),
                sparse,
            )
            for kernel in KERNELS
        ),
        Step("sanitizer", 55, sanitizer.rows, sparse),
        Step("gpu-tests:kernels", 25, partial(gpu_tests.rows, gpu_tests.KERNELS), ("gpu",)),
        *(
            Step(
                f"gemm:{kernel}",
                _GEMM.get(kernel, _A_KERNEL),
                partial(kernels.gemm, kernel, sizes.gemm),
                ("gpu",) if kernel == "dense" else sparse,
            )
            for kernel in ("dense", *KERNELS)
        ),
        *(
            Step(
                models.step(name),
                _MODEL[name],
                partial(models.rows, name, sizes.model),
                sparse if name.endswith("2:4") else ("gpu",),
            )
            for name in models.MODELS
        ),
        Step("pruning", 40, partial(pruning.rows, sizes.layers), ("gpu",)),
        *(
            Step(f"walk:{preset}", 40, partial(walks.rows, preset, sizes.walk), ("gpu",))
            for preset in walks.PRESETS
        ),
        Step("gpu-tests:pruning", 45, partial(gpu_tests.rows, gpu_tests.PRUNING), ("gpu",)),
        Step("onnxruntime", 10, onnxruntime.rows, ("gpu",)),
        Step("gpu-tests:engines", 40, partial(gpu_tests.rows, gpu_tests.ENGINES), sparse),
    ]
    if not rehearse:
        return found
    return [
        replace(
            step,
            seconds=_REHEARSED,
            rows=partial(rehearsal.rows, step.rows, step.name),
            needs=(),
        )
        for step in found
    ]
