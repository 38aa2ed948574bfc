"""Engines of a bundle's graph on a GPU: whether they agree with the CPU, and their speed."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from runtime.engine import Engine, open_engine
from thanos_deploy.bundle.engine_record import BuildRecord
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.gpu import driver
from thanos_deploy.gpu.rows import CheckRow, Row
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.measure.latency import Decode, Prefill, Scenario

# Largest difference of logits from products in TF32 or fp16 and in fp32, relative to their range.
AGREEMENT = 2e-2

_PROMPT, _STEPS = 16, 16
_TURNS, _WARMUP = 20, 3


def onnxruntime_cuda(task: Task) -> Iterator[Row]:
    """Compare ONNX Runtime on CUDA with the CPU; a rehearsal compares the CPU with itself."""
    assert task.bundle is not None
    engine = open_engine(task.bundle, provider=task.device)
    yield agreement("ort-cuda", "agrees with the CPU", open_engine(task.bundle), engine)
    medians = time_scenarios(engine, (Prefill(1, _PROMPT), Decode(1, _PROMPT, _STEPS)))
    told = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in medians.items())
    yield CheckRow("ort-cuda", "speed", "PASS", told)


def tensorrt(task: Task) -> Iterator[Row]:
    """Build, compare and time dense and sparse engines of one graph.

    Each form of the graph is tried: linear layers as matrix products, and as convolutions.
    """
    import exporters.tensorrt.engine
    from exporters.options import EngineRequest
    from exporters.targets.tensorrt import LIBRARY
    from exporters.tensorrt.stage import export_graph
    from runtime.engines import tensorrt as tensorrt_runtime

    assert task.bundle is not None
    graph = task.bundle / export_graph(Bundle.open(task.bundle), EngineRequest())
    reference = open_engine(task.bundle)
    for form in exporters.tensorrt.engine.FORMS:
        seconds: dict[str, dict[str, float]] = {}
        for kind, sparse in (("dense", False), ("sparse", True)):
            out = task.folder / f"{form}-{kind}"
            out.mkdir()
            build = exporters.tensorrt.engine.export(
                graph,
                out,
                library=LIBRARY,
                architectures=(driver.require().arch,),
                sparse=sparse,
                form=form,
            )
            engine = tensorrt_runtime.open_folder(out)
            yield agreement(
                "tensorrt", f"{form}, {kind}, agrees with ONNX Runtime", reference, engine
            )
            # A shorter prompt if the model's longest sequence has no room for the decode steps.
            prompt = min(build.profiles[0].sequence.usual, engine.max_sequence - _STEPS)
            seconds[kind] = time_scenarios(engine, (Prefill(1, prompt), Decode(1, prompt, _STEPS)))
        yield _sparse_kernels(form, build)
        yield CheckRow(
            "tensorrt",
            f"{form}, speed of sparse over dense",
            "PASS",
            ", ".join(
                f"{name} x{seconds['dense'][name] / own:.2f}"
                for name, own in seconds["sparse"].items()
            ),
        )


def _sparse_kernels(form: str, build: BuildRecord) -> CheckRow:
    """Check that the builder's log reports which kernels run the layers with 2:4."""
    silent = all(layer.verdict == "not reported" for layer in build.layers)
    failed = silent and build.summary.pattern_holds
    return CheckRow(
        "tensorrt",
        f"{form}, sparse kernels",
        "FAIL" if failed else "PASS",
        str(build.summary),
        "the log of this TensorRT version could not be read; report its lines with (Sparsity)"
        if failed
        else "",
    )


def onnxruntime_tensorrt(task: Task) -> Iterator[Row]:
    """Start ONNX Runtime's TensorRT provider twice, and compare it with the CPU.

    The second start has to load the engine that the first one built.
    """
    assert task.bundle is not None
    starts = []
    with _cache(task.folder):
        for _ in range(2):
            started = time.perf_counter()
            engine = open_engine(task.bundle, provider="tensorrt")
            engine.prefill(np.zeros((1, _PROMPT), dtype=np.int64))
            starts.append(time.perf_counter() - started)
        kept = [path.name for path in task.folder.rglob("*") if path.is_file()]
        yield agreement("ort-tensorrt", "agrees with the CPU", open_engine(task.bundle), engine)
    reloaded = bool(kept) and starts[1] < starts[0]
    yield CheckRow(
        "ort-tensorrt",
        "second start loads the engine",
        "PASS" if reloaded else "FAIL",
        f"{starts[0]:.1f} s, then {starts[1]:.1f} s; {len(kept)} files kept",
        "" if reloaded else "the engine cache is not used; see ONNX Runtime's log",
    )


def agreement(step: str, name: str, reference: Engine, engine: Engine) -> CheckRow:
    """Check that the logits of two engines agree."""
    error = disagreement(reference, engine)
    agrees = error <= AGREEMENT
    return CheckRow(
        step,
        name,
        "PASS" if agrees else "FAIL",
        f"logits differ by {error:.1e} of their range, limit {AGREEMENT:g}",
        "" if agrees else "do not serve this model; report it with the versions of the packages",
    )


def disagreement(reference: Engine, engine: Engine, *, vocabulary: int = 256) -> float:
    """Return the largest difference of the logits of two engines, relative to their range.

    The logits are those after a prompt and after some decode steps. Both engines get the same
    tokens: in each step, the most likely one of the reference.
    """
    ids = (np.arange(_PROMPT, dtype=np.int64)[None] * 7 + 1) % vocabulary
    want, got = reference.prefill(ids), engine.prefill(ids)
    worst = 0.0
    for step in range(_STEPS + 1):
        # np.maximum keeps NaN, which max would lose.
        worst = float(np.maximum(worst, np.abs(want - got).max() / np.ptp(want)))
        if step < _STEPS:
            token = want.argmax(axis=1)
            want, got = reference.decode(token), engine.decode(token)
    return worst


def time_scenarios(engine: Engine, scenarios: tuple[Scenario, ...]) -> dict[str, float]:
    """Return the median time in seconds of each scenario's headline metric, by scenario."""
    medians = {}
    for scenario in scenarios:
        turns = [scenario.take(engine, turn)[scenario.headline] for turn in range(_WARMUP + _TURNS)]
        medians[scenario.name] = statistics.median(
            sample for turn in turns[_WARMUP:] for sample in turn
        )
    return medians


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Use an empty folder as the cache, so that the first start has to build its engine."""
    before = os.environ.get("THANOS_DEPLOY_CACHE")
    os.environ["THANOS_DEPLOY_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["THANOS_DEPLOY_CACHE"]
        else:
            os.environ["THANOS_DEPLOY_CACHE"] = before
