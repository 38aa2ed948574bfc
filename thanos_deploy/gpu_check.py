"""One command on a GPU: does what this project says of GPUs hold on this one?

    environment    packages, driver, GPU, clocks
    ort-cuda       ONNX Runtime on CUDA computes what it computes on the CPU
    tensorrt       dense and sparse engines of one graph, as products and as convolutions: the
                   verdict on every layer, agreement, and speed
    ort-tensorrt   ONNX Runtime's TensorRT provider, and that its second start loads what the first
                   one built
    gemm           2:4 products of single layers: dense, torch's libraries, our kernels
    end-to-end     whole models of layers that are large enough: dense, 2:4, shrunk, and both
    verdict        what it comes to

A step that needs what is not there is skipped with the reason; a step that goes wrong does not keep
the others from running. That a dense kernel is faster than a sparse one is a result and no failure.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import exporters.onnx
import exporters.tensorrt
from runtime.engine import Engine, open_engine
from runtime.engines import tensorrt as tensorrt_runtime
from runtime.engines import torch as torch_runtime
from runtime.kernels import timing
from runtime.latency import Decode, Prefill, Scenario
from thanos_deploy import environment, gpu, nvml, preflight
from thanos_deploy.artifact import Bundle, Json
from thanos_deploy.check import Check
from thanos_deploy.checkpoint import Checkpoint, cast
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.mask import smallest
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.requests import EngineRequest
from thanos_deploy.stages.export import engine_graph

# Of the range of the logits: products in TF32 or fp16 against products in fp32.
AGREEMENT = 2e-2

_PROMPT, _STEPS = 16, 16
_TURNS, _WARMUP = 20, 3
_TWO_FOUR = SemiStructured(2, 4)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model of the shapes of Llama 3 8B, with fewer blocks: time goes with their number.

    Attributes:
        hidden, channels, heads, kv_heads, head_size: of a block.
        kept_heads, kept_channels: the parts that are left of the shrunk model; together that is
            70 % of a block.
        blocks: how many.
        vocabulary: how many.
        scenarios: what is timed.
    """

    hidden: int = 4096
    channels: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    kept_heads: float = 0.5
    kept_channels: float = 0.75
    blocks: int = 4
    vocabulary: int = 32000
    scenarios: tuple[Scenario, ...] = (
        Prefill(1, 2048),
        Prefill(8, 512),
        Decode(1, 512, 32),
        Decode(16, 512, 32),
    )


@dataclass(slots=True)
class Findings:
    """What a step saw: lines for people, figures for machines."""

    checks: list[Check] = field(default_factory=list)
    figures: Json = field(default_factory=dict)

    def add(self, name: str, outcome: Any, detail: str, fix: str = "") -> None:
        """Another line."""
        self.checks.append(Check(name, outcome, detail, fix))


Step = Callable[[Bundle, Path, Announce], Findings]


def run(bundle: Bundle, *, announce: Announce = quietly) -> Json:
    """Every step.

    Args:
        bundle: with the stage onnx finished; it is not changed, except by the graph in fp16 that
            engines are made from.
        announce: told of every piece of work.

    Returns:
        "checks" (one for each line of the table), "steps" (the figures of each), "gpu" and
        "environment".
    """
    bundle.require("onnx", f"`thanos-deploy export {bundle.path}`")
    found = gpu.probe()
    checks: list[Check] = []
    figures: Json = {}
    for name, step in STEPS.items():
        started = time.perf_counter()
        if not found.gpus and name != "environment":
            checks.append(Check(name, "SKIP", f"not measured (no GPU): {found.problem}"))
            continue
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            findings = _guarded(name, step, bundle, Path(folder), announce)
        checks += findings.checks
        figures[name] = {**findings.figures, "seconds": round(time.perf_counter() - started, 3)}
    checks.append(_verdict(checks, has_gpu=bool(found.gpus)))
    return {
        "bundle": bundle.path.name,
        "gpu": asdict(found),
        "environment": environment.describe(),
        "checks": [asdict(check) for check in checks],
        "steps": figures,
    }


def _guarded(name: str, step: Step, bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    try:
        return step(bundle, folder, announce)
    except PlatformError as error:
        return Findings([Check(name, "SKIP", error.message, error.fix)])
    except DeployError as error:
        return Findings([Check(name, "FAIL", error.message, error.fix)])
    # Whatever a driver or a library throws here is a finding about this machine.
    except (RuntimeError, OSError, ValueError) as error:
        return Findings([Check(name, "FAIL", f"{type(error).__name__}: {error}")])


def _verdict(checks: list[Check], *, has_gpu: bool) -> Check:
    counts = {
        outcome: sum(check.outcome == outcome for check in checks)
        for outcome in ("PASS", "FAIL", "SKIP")
    }
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if counts["FAIL"]:
        return Check("verdict", "FAIL", text, fix="see the lines with FAIL")
    return Check("verdict", "PASS" if has_gpu else "SKIP", text)


def environment_step(bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    """Packages, driver, GPU, clocks."""
    size = sum(file.bytes for file in bundle.stages["onnx"].files.values())
    findings = Findings(preflight.checks(graph_bytes=size, folder=bundle.path))
    device = nvml.Gpu.probe()
    if device is None:
        findings.add(
            "clocks",
            "SKIP",
            "not measured: no GPU, or no nvidia-ml-py",
            fix="" if not gpu.probe().gpus else "pip install 'thanos-deploy[nvml]'",
        )
        return findings
    reading = device.read()
    findings.figures["reading"] = asdict(reading)
    findings.add("clocks", "PASS", f"{device.name}, {reading.clock_hz / 1e9:.2f} GHz")
    return findings


def ort_cuda_step(bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    """ONNX Runtime on CUDA beside the CPU."""
    findings = Findings()
    _agree(
        findings,
        "ort-cuda: agrees with the CPU",
        open_engine(bundle.path),
        open_engine(bundle.path, provider="cuda"),
    )
    return findings


def tensorrt_step(bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    """Dense and sparse engines of one graph, in both forms."""
    findings = Findings()
    graph = bundle.path / engine_graph(bundle, EngineRequest(), announce=announce)
    reference = open_engine(bundle.path)
    arch = gpu.require().arch
    seconds: dict[str, dict[str, float]] = {}
    for form in exporters.tensorrt.FORMS:
        for kind, sparse in (("dense", False), ("sparse", True)):
            label = f"{form}, {kind}"
            out = folder / f"{form}-{kind}"
            out.mkdir()
            build = exporters.tensorrt.export(
                graph,
                out,
                architectures=(arch,),
                sparse=sparse,
                form=form,
                on_progress=announce(f"Build a TensorRT engine ({label})"),
            )
            engine = tensorrt_runtime.open_folder(out)
            _agree(findings, f"tensorrt: {label}, agrees with ONNX Runtime", reference, engine)
            # With room for the steps after it, in a model that takes hardly more tokens.
            prompt = min(build["profiles"][0]["sequence"]["usual"], engine.max_sequence - _STEPS)
            seconds[label] = _time(engine, (Prefill(1, prompt), Decode(1, prompt, _STEPS)))
            findings.figures[label] = {
                "seconds": seconds[label],
                **{key: build[key] for key in ("summary", "layers", "engine_bytes")},
            }
        _judge_sparse(findings, form, seconds)
    return findings


def _judge_sparse(
    findings: Findings, form: str, seconds: Mapping[str, Mapping[str, float]]
) -> None:
    build = findings.figures[f"{form}, sparse"]
    summary = build["summary"]
    silent = all(layer["verdict"] == "not reported" for layer in build["layers"])
    findings.add(
        f"tensorrt: {form}, sparse kernels",
        "FAIL" if silent and summary["pattern_holds"] else "PASS",
        f"{summary['picked']} picked, {summary['eligible']} eligible, {summary['pattern_holds']} "
        f"hold 2:4, of {summary['layers']} layers",
        fix="the log of this version is not understood; report its (Sparsity) lines"
        if silent and summary["pattern_holds"]
        else "",
    )
    findings.add(
        f"tensorrt: {form}, speed of sparse over dense",
        "PASS",
        _speeds(seconds[f"{form}, dense"], seconds[f"{form}, sparse"]),
    )


def ort_tensorrt_step(bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    """ONNX Runtime's TensorRT provider, started twice."""
    findings = Findings()
    progress = announce("Start ONNX Runtime with TensorRT twice")
    starts = []
    with _cache(folder):
        for index in range(2):
            progress(index, 2)
            started = time.perf_counter()
            engine = open_engine(bundle.path, provider="tensorrt")
            engine.prefill(np.zeros((1, _PROMPT), dtype=np.int64))
            starts.append(time.perf_counter() - started)
        progress(2, 2)
        kept = [path.name for path in folder.rglob("*") if path.is_file()]
        _agree(findings, "ort-tensorrt: agrees with the CPU", open_engine(bundle.path), engine)
    findings.figures |= {"start_seconds": starts, "kept": kept}
    reloaded = bool(kept) and starts[1] < starts[0]
    findings.add(
        "ort-tensorrt: second start loads the engine",
        "PASS" if reloaded else "FAIL",
        f"{starts[0]:.1f} s, then {starts[1]:.1f} s; {len(kept)} files kept",
        fix="" if reloaded else "the engine cache is not used; see ONNX Runtime's log",
    )
    return findings


def gemm_step(bundle: Bundle, folder: Path, announce: Announce) -> Findings:
    """Single products."""
    findings = Findings()
    progress = announce("Time products with 2:4 weights")
    times = list(timing.measure(dtypes=["fp16"], on_progress=progress))
    # The form that `plan --measured` reads.
    findings.figures |= {
        "gpu": gpu.require().name,
        "dtype": "fp16",
        "records": [asdict(record) for record in times],
    }
    dense = {
        (each.outputs, each.inputs, each.tokens): each.median
        for each in times
        if each.kernel == "dense"
    }
    for kernel in dict.fromkeys(each.kernel for each in times if each.kernel != "dense"):
        own = [each for each in times if each.kernel == kernel]
        measured = [each for each in own if each.seconds]
        wrong = [each for each in own if each.failed]
        speeds = [dense[each.outputs, each.inputs, each.tokens] / each.median for each in measured]
        if wrong:
            findings.add(f"gemm: {kernel}", "FAIL", f"{wrong[0].reason}, {len(wrong)} times")
        elif not speeds:
            findings.add(f"gemm: {kernel}", "SKIP", own[0].reason or "not measured")
        else:
            findings.add(
                f"gemm: {kernel}",
                "PASS",
                f"{min(speeds):.2f} to {max(speeds):.2f} times as fast as dense, median "
                f"{statistics.median(speeds):.2f}, over {len(speeds)} shapes",
            )
    return findings


def end_to_end_step(
    bundle: Bundle, folder: Path, announce: Announce, sizes: Sizes | None = None
) -> Findings:
    """Whole models of large layers."""
    findings = Findings()
    sizes = sizes or Sizes()
    models = make_models(folder, sizes)
    seconds: dict[tuple[str, str], dict[str, float]] = {}
    for name, path in models.items():
        variants = ("cusparselt", "cutlass", "triton") if "2:4" in name else ("eager",)
        for backend in (*(f"torch:{variant}" for variant in variants), "tensorrt"):
            with _skipped(findings, f"end-to-end: {name} on {backend}"):
                torch.cuda.empty_cache()
                engine: Engine
                if backend == "tensorrt":
                    engine = _tensorrt_engine(path, folder / f"{name} engine", sizes, announce)
                else:
                    variant = backend.removeprefix("torch:")
                    engine = torch_runtime.open_model(path, provider="cuda", variant=variant)
                seconds[name, backend] = _time(engine, sizes.scenarios)
                findings.figures[f"{name}, {backend}"] = {
                    "seconds": seconds[name, backend],
                    "memory_bytes": _held(),
                }
                del engine
    for (name, backend), own in seconds.items():
        baseline = seconds.get(("dense", backend)) or seconds.get(("dense", "torch:eager"))
        if baseline is not None and name != "dense":
            findings.add(f"end-to-end: {name} on {backend}", "PASS", _speeds(baseline, own))
    return findings


STEPS: dict[str, Step] = {
    "environment": environment_step,
    "ort-cuda": ort_cuda_step,
    "tensorrt": tensorrt_step,
    "ort-tensorrt": ort_tensorrt_step,
    "gemm": gemm_step,
    "end-to-end": end_to_end_step,
}


def make_models(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Random Llama models in fp16: dense, 2:4, shrunk, and shrunk to 2:4.

    What they say is nonsense; how long they take does not depend on it.
    """
    models = {}
    for name, heads, channels in (
        ("dense", 1.0, 1.0),
        ("shrunk", sizes.kept_heads, sizes.kept_channels),
    ):
        config = LlamaConfig(
            hidden_size=sizes.hidden,
            intermediate_size=int(channels * sizes.channels),
            num_attention_heads=int(heads * sizes.heads),
            num_key_value_heads=int(heads * sizes.kv_heads),
            head_dim=sizes.head_size,
            num_hidden_layers=sizes.blocks,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=max(scenario.tokens for scenario in sizes.scenarios),
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        cast(model, torch.float16)
        models[name] = folder / name
        model.save_pretrained(models[name])
        for linear in Checkpoint.open(models[name]).linears:
            weight = model.get_submodule(linear).weight
            assert isinstance(weight, torch.Tensor)
            weight.data[smallest(weight.data.float().abs(), _TWO_FOUR, per_row=True)] = 0
        sparse = "2:4" if name == "dense" else "shrunk, 2:4"
        models[sparse] = folder / sparse
        model.save_pretrained(models[sparse])
    return models


def disagreement(reference: Engine, engine: Engine, *, vocabulary: int = 256) -> float:
    """Largest difference of the logits over a prompt and some steps, relative to their range.

    Both are given the same tokens throughout, those that the reference likes best.
    """
    ids = (np.arange(_PROMPT, dtype=np.int64)[None] * 7 + 1) % vocabulary
    want, got = reference.prefill(ids), engine.prefill(ids)
    worst = 0.0
    for step in range(_STEPS + 1):
        # Written so that NaN is not lost.
        worst = float(np.maximum(worst, np.abs(want - got).max() / np.ptp(want)))
        if step < _STEPS:
            token = want.argmax(axis=1)
            want, got = reference.decode(token), engine.decode(token)
    return worst


def _agree(findings: Findings, name: str, reference: Engine, engine: Engine) -> None:
    error = disagreement(reference, engine)
    findings.figures[name] = error
    findings.add(
        name,
        "PASS" if error <= AGREEMENT else "FAIL",
        f"logits differ by {error:.1e} of their range, limit {AGREEMENT:g}",
        fix="" if error <= AGREEMENT else "do not serve this; report the model and the versions",
    )


def _time(engine: Engine, scenarios: tuple[Scenario, ...]) -> dict[str, float]:
    """Median seconds of each scenario's headline."""
    medians = {}
    for scenario in scenarios:
        turns = [scenario.take(engine, turn)[scenario.headline] for turn in range(_WARMUP + _TURNS)]
        medians[scenario.name] = statistics.median(
            sample for turn in turns[_WARMUP:] for sample in turn
        )
    return medians


def _speeds(slow: Mapping[str, float], fast: Mapping[str, float]) -> str:
    return ", ".join(f"{name} x{slow[name] / fast[name]:.2f}" for name in fast)


def _tensorrt_engine(model: Path, folder: Path, sizes: Sizes, announce: Announce) -> Engine:
    """Export a model, build its engine, load it."""
    for part in ("onnx", "engine"):
        (folder / part).mkdir(parents=True)
    exporters.onnx.export(
        Checkpoint.open(model),
        folder / "onnx",
        pattern=None,
        dtype="fp16",
        on_progress=announce(f"Export the model {model.name} to ONNX"),
    )
    batches = sorted({scenario.batch for scenario in sizes.scenarios})
    prompts = sorted(
        {scenario.prompt for scenario in sizes.scenarios if isinstance(scenario, Prefill)}
    )
    exporters.tensorrt.export(
        folder / "onnx",
        folder / "engine",
        architectures=(gpu.require().arch,),
        batch=batches,
        prompt=prompts,
        on_progress=announce(f"Build a TensorRT engine of the model {model.name}"),
    )
    return tensorrt_runtime.open_folder(folder / "engine")


def _held() -> int | None:
    """Memory of the GPU that this process holds; None if the driver does not say."""
    device = nvml.Gpu.probe()
    return None if device is None else device.read().memory_bytes.get(os.getpid())


@contextmanager
def _skipped(findings: Findings, name: str) -> Iterator[None]:
    """What cannot be measured is a line of its own, and the rest goes on."""
    try:
        yield
    except PlatformError as error:
        findings.add(name, "SKIP", error.message, error.fix)
    except DeployError as error:
        findings.add(name, "FAIL", error.message, error.fix)


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """An empty cache, so that the first start builds."""
    before = os.environ.get("THANOS_DEPLOY_CACHE")
    os.environ["THANOS_DEPLOY_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["THANOS_DEPLOY_CACHE"]
        else:
            os.environ["THANOS_DEPLOY_CACHE"] = before
