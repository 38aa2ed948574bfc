"""One command on a GPU: does what this project says of GPUs hold on this one?

    preflight          packages, drivers, GPUs
    card               what there is; in every choice of steps
    peaks              the bandwidth of a copy, the speed of a large product
    correctness:KERNEL products with 2:4 weights against float64
    gemm:KERNEL        how long they take, the dense product among them
    model:MODEL        whole models of large layers: dense, 2:4, structured, both, and compiled
    pruning            seconds a layer on the GPU, and that it prunes as the CPU does
    walk:PRESET        the same of whole blocks of the 8B model's sizes, with their memory
    ort-cuda           ONNX Runtime on CUDA computes what it computes on the CPU
    tensorrt           dense and sparse engines of one graph: the verdict on every layer, agreement,
                       and speed
    ort-tensorrt       ONNX Runtime's TensorRT provider, and that its second start loads what the
                       first one built
    tensorrt-models    the whole models as TensorRT engines

A step that needs what is not there is skipped with the reason, before it makes anything; a step
that goes wrong keeps its rows and loses nothing of the others. That a dense kernel is faster than a
sparse one is a result and no failure. The same measuring functions, with larger sizes, are what
`python -m benchmarks.gpu_campaign` runs.
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

# For all steps, one after the other.
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

# What a step can need, and which lines of `preflight` say that it is there. The last of them are
# tried where preflight cannot tell.
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
    """See what there is, and do the steps on the GPU.

    Args:
        todo: some of `STEPS`, or steps like them.
        journal: where each row is written as it is measured; one that is there is replaced.
        bundle: with the stage onnx finished; None if there is none. It is not changed, except by
            the graph in fp16 that engines are made from.
        seconds: for all steps.
        log: where what they print goes; None for standard error.
        announce: told of every step.

    Returns:
        All rows; the first are those of the preflight.

    Raises:
        UsageError: the time is too short for any step.
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
    """What steps can need and is not there, with the reason."""
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
    """Refuse a run that is not as it should be.

    Raises:
        PlatformError: no step but that of the card could be done.
        GateError: something failed.
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
    """What came of it, for people: the preflight, each step and what failed in it, a verdict."""
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
