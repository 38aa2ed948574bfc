"""The steps of `thanos-deploy gpu-check`, which tests this project's claims about GPUs on this GPU.

    preflight          packages, drivers, GPUs
    card               the GPU, its driver and the versions; runs with every choice of steps
    peaks              bandwidth of a copy, and rate of a large matrix product
    correctness:KERNEL products with 2:4 weights, compared with float64
    gemm:KERNEL        times of such products, and of the dense product
    model:MODEL        whole models of large layers: dense, 2:4, structured, both, and compiled
    pruning            time to prune a layer on the GPU, and agreement with the CPU
    walk:PRESET        time and memory to prune whole blocks of the 8B model's sizes, and agreement
                       with the CPU
    ort-cuda           ONNX Runtime on CUDA: agreement with the CPU, and speed
    tensorrt           dense and sparse engines of one graph: sparse kernels, agreement, and speed
    ort-tensorrt       ONNX Runtime's TensorRT provider: agreement, and that its second start loads
                       the engine that the first one built
    tensorrt-models    the whole models as TensorRT engines

A step that lacks something is skipped with the reason, before it does any work. A step that fails
keeps its rows and does not affect the other steps. A dense kernel that is faster than a sparse one
is a result, not a failure. `python -m benchmarks.gpu_campaign` runs the same measuring functions
with larger sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from exporters import preflight
from thanos_deploy.check import Check
from thanos_deploy.errors import GateError, PlatformError
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import CheckRow, StepRow
from thanos_deploy.gpu_check import bundle as bundles
from thanos_deploy.gpu_check import card, kernels, models, pruning, steps, walks, whole_engines
from thanos_deploy.gpu_check.kernels import KERNELS
from thanos_deploy.gpu_check.steps import Missing, Step, Task
from thanos_deploy.progress import Announce, quietly

COMMAND = "thanos-deploy gpu-check"
CARD, PREFLIGHT = "card", "preflight"

# Time limit for all steps together.
SECONDS = 1200.0

STEPS: tuple[Step, ...] = (
    Step(CARD, 5, partial(card.rows, COMMAND), ("gpu",), always=True),
    Step("peaks", 10, partial(card.peak_rows, card.Sizes()), ("gpu",)),
    *(
        Step(
            f"correctness:{kernel}",
            25,
            partial(kernels.correctness, kernel, kernels.CORRECTNESS),
            ("gpu", "sparse"),
        )
        for kernel in KERNELS
    ),
    *(
        Step(
            f"gemm:{kernel}",
            20,
            partial(kernels.gemm, kernel, kernels.Grid()),
            ("gpu",) if kernel == "dense" else ("gpu", "sparse"),
        )
        for kernel in ("dense", *KERNELS)
    ),
    *(
        Step(
            models.step(name),
            60 if name.endswith("2:4") else 20,
            partial(models.rows, name, models.Sizes(), variants=variants),
            ("gpu", "sparse") if name.endswith("2:4") else ("gpu",),
        )
        for name, variants in (
            ("dense", ("eager",)),
            ("2:4", ("sparse", "cusparselt", "triton", "mma-sp")),
            ("structured", ("eager",)),
            ("structured, 2:4", ("sparse",)),
        )
    ),
    Step(
        "model:compiled",
        120,
        partial(models.rows, "dense", models.Sizes(), variants=("compiled",)),
        ("gpu",),
    ),
    Step("pruning", 60, partial(pruning.rows, pruning.Sizes()), ("gpu",)),
    *(
        Step(f"walk:{preset}", 60, partial(walks.rows, preset, walks.Sizes()), ("gpu",))
        for preset in walks.PRESETS
    ),
    Step("ort-cuda", 20, bundles.onnxruntime_cuda, ("gpu", "bundle", "onnxruntime-cuda")),
    Step("tensorrt", 120, bundles.tensorrt, ("gpu", "bundle", "tensorrt")),
    Step(
        "ort-tensorrt",
        60,
        bundles.onnxruntime_tensorrt,
        ("gpu", "bundle", "tensorrt", "onnxruntime-tensorrt"),
    ),
    Step(
        "tensorrt-models",
        300,
        partial(whole_engines.rows, whole_engines.SIZES),
        ("gpu", "sparse", "tensorrt"),
    ),
)

# What a step can need -> the checks of `preflight` that show whether it is there. Something that
# none of them reports as missing counts as there, so the step tries it.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "gpu": ("GPU", "GPU 0", "PyTorch on CUDA"),
    "sparse": ("GPU 0: sparse tensor cores",),
    "onnxruntime-cuda": ("ONNX Runtime", "ONNX Runtime on CUDA"),
    "tensorrt": ("target tensorrt",),
}


def run(
    todo: Sequence[Step],
    journal: Path,
    *,
    bundle: Path | None = None,
    seconds: float = SECONDS,
    log: Path | None = None,
    announce: Announce = quietly,
) -> Records:
    """Run the preflight checks, then the steps on the GPU.

    Args:
        todo: some of `STEPS`, or similar steps.
        journal: file to which each row is written as it is measured; an existing file is replaced.
        bundle: a bundle with the stage onnx finished; None if there is none. It is not changed,
            except that the graph in fp16 from which engines are built is added.
        seconds: time limit for all steps together.
        log: file for what the steps print; None for standard error.
        announce: called with the name of every step.

    Returns:
        All rows, those of the preflight first.

    Raises:
        UsageError: the time limit is too short for any step.
    """
    journal.unlink(missing_ok=True)
    checks = preflight.checks()
    steps.run(
        todo,
        Task("cuda", bundle),
        journal,
        seconds=seconds,
        missing=missing(checks, bundle),
        log=log,
        card=nvml.Monitor.probe(),
        announce=announce,
    )
    first = tuple(CheckRow(PREFLIGHT, **asdict(check)) for check in checks)
    return Records((*first, *gpu_records.read_journal(journal)))


def missing(checks: Sequence[Check], bundle: Path | None) -> dict[str, Missing]:
    """Return what steps can need and is missing here, with the reason."""
    found = {
        need: Missing(f"not measured ({check.name}: {check.detail})", check.fix)
        for need, names in _NEEDS.items()
        for check in reversed(checks)
        if check.name in names and check.outcome != "PASS"
    }
    for check in checks:
        if check.name == "ONNX Runtime with TensorRT" and check.outcome == "FAIL":
            found["onnxruntime-tensorrt"] = Missing(check.detail, check.fix)
    if bundle is None:
        found["bundle"] = Missing(
            "no bundle was given", "give --bundle OUT, pruned to 2:4 and exported to ONNX"
        )
    return found


def require_passed(records: Records) -> None:
    """Check that a run measured something and that nothing failed.

    Raises:
        PlatformError: no step could run, except perhaps the step "card".
        GateError: a check or a step failed.
    """
    ends = records.of(StepRow)
    others = [row for row in ends if row.step != CARD]
    if all(row.outcome == "SKIP" for row in others):
        first = (others or ends)[0]
        raise PlatformError(f"no step could run: {first.step}: {first.detail}", fix=first.fix)
    for check in lines(records):
        if check.outcome == "FAIL":
            raise GateError(f"{check.name}: {check.detail}", fix=check.fix)


def lines(records: Records) -> list[Check]:
    """Return the lines of the result table: preflight, steps with their failures, and a verdict."""
    found = []
    for row in records.rows:
        if isinstance(row, CheckRow) and (row.step == PREFLIGHT or row.outcome != "PASS"):
            found.append(Check(f"{row.step}: {row.name}", row.outcome, row.detail, row.fix))
        elif isinstance(row, StepRow):
            found.append(Check(row.step, row.outcome, row.detail, row.fix))
    if records.status == "INVALID":
        found += [
            Check("times", "FAIL", reason, "measure again while no other process uses the GPU")
            for reason in records.reasons
        ]
    counts = {
        outcome: sum(check.outcome == outcome for check in found)
        for outcome in ("PASS", "FAIL", "SKIP")
    }
    measured = any(row.outcome != "SKIP" for row in records.of(StepRow))
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if counts["FAIL"]:
        return [*found, Check("verdict", "FAIL", told, "see the lines of the table with FAIL")]
    return [*found, Check("verdict", "PASS" if measured else "SKIP", told)]
