"""Bundles with realistic records but no model, for tests of code that reads records only.

Most of the file is these records, so it is longer than others.
"""

import json
import random
import statistics
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jsonschema

from exporters.tensorrt.profiles import profiles
from thanos_deploy.bundle import files, layout, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.engine_record import BuildRecord, LayerProof, Summary
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.graph_record import (
    CacheRecord,
    GraphRecord,
    GraphResult,
    ParityCase,
    WeightRecord,
)
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Source
from thanos_deploy.machine import environment
from thanos_deploy.measure.latency import KINDS
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.run import PRUNED

SCHEMA = json.loads(
    resources.files("thanos_deploy.report").joinpath("report.schema.json").read_text()
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

SOURCE = Source("folder", "tiny", "", "b1" * 32)
ALL = ("prune", "eval", "onnx", "bench")
SAMPLE = {"prompt": "The capital of France is", "dense": " Paris.", "pruned": ' the "L"\nin'}
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BLOCKS = 3


def write_bundle(
    path: Path,
    *,
    source: Source | None = None,
    pattern: str = "2:4",
    method: str = "thanos",
    dense: float = 10.8,
    perplexity: float = 16.8,
    text: str = "builtin (held-out part)",
    stages: tuple[str, ...] = ALL,
    dtype: str = "fp32",
    tokenizer: str = "{}",
    bytes_: int = 4000,
    runs: tuple[Json, ...] | None = None,
    graphs: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write a bundle with the named stages, recorded as the commands would record them."""
    runs = (run(),) if runs is None else runs
    made: Json = {
        "prune": lambda folder: _prune(folder, tokenizer, bytes_, pattern),
        "eval": lambda folder: _eval(folder, perplexity, text),
        "onnx": lambda folder: _onnx(folder, bytes_, cut=pattern.startswith("structured")),
        "packed": lambda folder: _file(folder / "packed" / "model.packed.safetensors", 2500),
        "bench": lambda folder: _bench(folder, runs),
    }
    options: Json = {
        "prune": {
            "pattern": pattern,
            "method": method,
            **({"cut": True} if pattern.startswith("structured") else {}),
            "calib": "builtin",
            "seed": 0,
        },
        "eval": {"text": "builtin", "text_field": "text", "segments": 2, "seqlen": 64},
        "onnx": {"dtype": dtype, "max_sequence": None},
        "packed": {},
        "bench": {document["run"]: document["request"] for document in runs},
    }
    with manifest.claim(path, source or SOURCE) as bundle:
        for stage in stages:
            inputs: Json = {"model": bundle.model_sha256} if "prune" in bundle.stages else {}
            if stage == "eval":
                inputs["dense"] = _quality(dense, text)
                inputs["text"] = "e5" * 32
            if stage == "bench":
                own = bundle.graph_sha256 if "onnx" in stages else {}
                inputs = {document["run"]: {PRUNED: own, **(graphs or {})} for document in runs}
            bundle.run(stage, made[stage], options=options[stage], inputs=inputs)
    return path


def build_record(target: str = "tensorrt-rtx") -> BuildRecord:
    """Return the record of an engine of which half of the layers run sparse."""
    layers = tuple(
        LayerProof(
            name=f"model.layers.{block}.{name}",
            shape=(32, 32),
            pattern_holds=True,
            verdict="picked" if name.startswith("mlp") else "eligible",
            reason="a dense kernel was faster" if name.startswith("self") else "sparse kernel",
            engine_layer="",
        )
        for block in range(BLOCKS)
        for name in LINEARS
    )
    return BuildRecord(
        format=layout.BUILD_FORMAT,
        target=target,
        library="1.2.0",
        arch=("sm80", "sm86"),
        dtype="fp16",
        sparse_weights=True,
        sparse_form="matmul",
        compatibility="none",
        profiles=profiles((1, 8), (32, 64), 128),
        max_sequence=128,
        seconds=12.3,
        peak_memory_bytes=1000,
        engine_bytes=123,
        network_layers=100,
        engine_layers=40,
        layers=layers,
        summary=Summary.of(layers),
    )


def add_to_model(path: Path, name: str, content: str) -> None:
    """Add a text file to the model of a bundle, recorded as a stage of its own."""

    def produce(folder: Path) -> Json:
        place = folder / layout.MODEL / name
        place.parent.mkdir(parents=True)
        place.write_text(content)
        return {}

    with manifest.claim(path, Bundle.open(path).source) as bundle:
        bundle.run(name.replace("/", "-"), produce, options={}, inputs={}, overwrite=True)


def add_build(path: Path, target: str = "tensorrt-rtx") -> None:
    """Add the record of an engine to a bundle."""
    stage, record = f"{target}-sm80", build_record(target)

    def produce(folder: Path) -> Json:
        place = folder / layout.engine_folder(stage)
        place.mkdir(parents=True)
        files.write_json(place / layout.BUILD, encode(record))
        return encode(record.result({}))

    with manifest.claim(path, Bundle.open(path).source) as bundle:
        bundle.run(stage, produce, options={}, inputs={"onnx": bundle.graph_sha256})


def run(
    name: str = "latency",
    *,
    factor: float = 0.9,
    half: float = 0.02,
    status: str = "VALID",
    reasons: tuple[str, ...] = (),
    baseline: str = "dense",
    kinds: tuple[str, ...] = ("prefill", "decode"),
    others: Mapping[str, float] | None = None,
) -> Json:
    """Return a benchmark's document; the pruned model takes `factor` times the baseline's time."""
    factors = {baseline: 1.0, "pruned": factor, **(others or {})}
    draw = random.Random(0)
    metrics = {
        "prefill": {"prefill": 0.2},
        "decode": {"decode": 0.03},
        "generate": {"ttft": 0.2, "inter_token": 0.03, "total": 0.7, "tokens_per_second": 23.0},
        "open-loop": {"ttft": 0.3, "request": 0.8},
    }
    return {
        "format": "thanos-deploy/bench/1",
        "run": name,
        "status": status,
        "reasons": list(reasons),
        "backend": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "baseline": baseline,
        "rounds": 24,
        "request": encode(BenchRequest(run=name, kinds=kinds, subjects=tuple(factors))),
        "environment": {**encode(environment.describe()), "threads": 2, "governor": None},
        "machine": {"memory_bandwidth_bytes_per_second": 2e10, "gemm_flops_per_second": {}},
        "gpu": None,
        "subjects": {
            who: {
                "model": "tiny",
                "sha256": SOURCE.sha256,
                "pattern": None,
                "method": None,
                "dtype": "fp32",
                "file_bytes": 5000,
                "load_peak_bytes": 724_000_000,
                "steady_bytes": 690_000_000,
                "peak_bytes": 730_000_000,
                "cache_bytes_per_token": 46080,
                "gpu_peak_bytes": None,
            }
            for who in factors
        },
        "scenarios": [
            {
                "name": f"{kind}-1x128",
                "kind": kind,
                "headline": KINDS[kind].headline,
                "batch": 1,
                "prompt": 128,
                "past": 0,
                "new_tokens": 16,
                "warmup": {"rounds": 2, "stable": True},
                "results": {
                    who: {
                        "metrics": {
                            metric: _metric(draw, metric, middle * factors[who])
                            for metric, middle in metrics[kind].items()
                        },
                        **(
                            {
                                "ratio": {
                                    metric: {
                                        "estimate": factors[who],
                                        "low": factors[who] - half,
                                        "high": factors[who] + half,
                                        "level": 0.95,
                                    }
                                    for metric in metrics[kind]
                                }
                            }
                            if who != baseline
                            else {}
                        ),
                        "ceiling": {"bytes": 1, "flops": 1, "seconds": 0.1, "bound": "memory"},
                        "of_ceiling": 0.5,
                    }
                    for who in factors
                },
            }
            for kind in kinds
        ],
    }


def _metric(draw: random.Random, name: str, middle: float) -> Json:
    samples = [middle * draw.lognormvariate(0.0, 0.05) for _ in range(24)]
    centiles = statistics.quantiles(samples, n=100, method="inclusive")
    return {
        "unit": "1/s" if name == "tokens_per_second" else "s",
        "samples": samples,
        "count": len(samples),
        "median": centiles[49],
        "p90": centiles[89],
        "p99": centiles[98],
    }


def _prune(folder: Path, tokenizer: str, bytes_: int, pattern: str) -> Json:
    _file(folder / "model" / "model.safetensors", bytes_)
    (folder / "model" / "tokenizer.json").write_text(tokenizer)
    cut = pattern.startswith("structured")
    blocks = [_cut_block(block) if cut else _block(block) for block in range(BLOCKS)]
    files.write_json(folder / "layers.json", blocks)
    shared = {
        "median_relative_error": 0.02,
        "worst_relative_error": 0.08,
        "worst_layer": "model.layers.0.mlp.up_proj",
        "largest_damping": 0.01,
        "dense_bytes": 4800,
        "parts": {
            "dense": {"embeddings": 1200, "attention": 1000, "mlp": 2500, "norms": 100, "head": 0},
            "pruned": {
                "embeddings": 1200,
                "attention": 1000,
                "mlp": bytes_ - 2300,
                "norms": 100,
                "head": 0,
            },
        },
    }
    if cut:
        widths = {
            "removed": 0.2,
            "stock_config": True,
            "block_parameters_before": 1000,
            "block_parameters_after": 800,
            "predicted_loss": 0.1,
            "blocks": [
                {
                    "before": block["before"],
                    "after": block["after"],
                    "parameters_before": 1000,
                    "parameters_after": 800,
                    "predicted_loss": 0.1,
                }
                for block in blocks
            ],
        }
        return {**shared, "widths": widths}
    return {
        **shared,
        "layers": BLOCKS * len(LINEARS),
        "weights": 12288,
        "sparsity": 0.5,
        "pattern_holds": True,
        "layers_off_pattern": [],
    }


def _block(block: int) -> Json:
    return {
        "layers": [
            {
                "name": f"model.layers.{block}.{name}",
                "rows": 32,
                "cols": 32,
                "sparsity": 0.5,
                "pattern_holds": True,
                "relative_error": 0.01 * (block + place + 1),
                "damping": 0.01,
                "seconds": 0.1,
            }
            for place, name in enumerate(LINEARS)
        ],
        "seconds": {},
    }


def _cut_block(block: int) -> Json:
    return {
        "before": {"heads": 4, "kv_heads": 2, "channels": 48},
        "after": {"heads": 4, "kv_heads": 2, "channels": 32},
        "heads": [0, 1, 2, 3],
        "channels": list(range(32)),
        "heads_error": 0.0,
        "channels_error": 0.01 * (block + 1),
        "damping": 0.01,
        "seconds": {},
    }


def _eval(folder: Path, perplexity: float, text: str) -> Json:
    (folder / "eval").mkdir()
    (folder / "eval" / "perplexity.json").write_text("{}")
    return _quality(perplexity, text)


def _quality(perplexity: float, text: str) -> Json:
    return {"text": text, "value": perplexity, "segments": 2, "length": 64}


def _onnx(folder: Path, bytes_: int, *, cut: bool) -> Json:
    _file(folder / layout.ONNX / layout.GRAPH_DATA, bytes_)
    weights = tuple(
        WeightRecord(
            name=f"model.layers.{block}.{name}",
            shape=(32, 32),
            input_axis=0,
            sparsity=0.0 if cut else 0.5,
            pattern=None if cut else "2:4",
            pattern_holds=None if cut else True,
        )
        for block in range(BLOCKS)
        for name in LINEARS
    )
    record = GraphRecord(
        opset=20,
        dtype="fp32",
        pattern=None if cut else "2:4",
        max_sequence=128,
        cache=CacheRecord((), 64),
        parity_limit=1e-4,
        parity=(ParityCase("prefill", 1, 0, 7, logits_error=1e-6, cache_error=2e-6),),
        weights=weights,
    )
    files.write_record(folder / layout.ONNX / layout.GRAPH_RECORD, record)
    return encode(GraphResult.of(record))


def _bench(folder: Path, runs: tuple[Json, ...]) -> Json:
    out = folder / "bench"
    out.mkdir()
    for document in runs:
        files.write_json(out / f"{document['run']}.json", document)
    files.write_json(out / "sample.json", SAMPLE)
    return {"runs": {document["run"]: document for document in runs}, "sample": SAMPLE}


def _file(path: Path, size: int) -> Json:
    path.parent.mkdir()
    path.write_bytes(b"0" * size)
    return {}


def report_of(path: Path) -> Json:
    """Return report.json of a bundle, validated."""
    return checked(json.loads((path / "report" / "report.json").read_text()))


def checked(report: Json) -> Json:
    """Validate a report against the published schema, and return it."""
    VALIDATOR.validate(report)
    return report
