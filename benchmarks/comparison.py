"""A worked comparison: what each pattern costs and brings on a CPU, in quality, time and bytes.

Usage: python -m benchmarks.comparison OUT [--calib FILE] [--eval-text FILE]

Prunes SmolLM2-135M to every pattern and exports the results and the dense model for ONNX Runtime
and for ORT-GenAI; the dense and the best pruned one also with int8 weights. All run on ONNX Runtime
in one benchmark, in turns, each in a process of its own; then on ORT-GenAI, in turns in one
process. The perplexity of an int8 model is that of the graph, as ONNX Runtime computes it.

Writes the report of all models to RESULTS/comparison.{html,md,json}, its picture of perplexity
against time and size to RESULTS/comparison.svg, and the figures of both runtimes to
RESULTS/comparison-runtimes.json, and prints these as a table. OUT keeps the bundles (8 GB):
repeating the command continues, and takes what is there.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from torch import Tensor

import exporters.genai
from benchmarks.smollm2 import gguf_path
from exporters.options import ExportRequest
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import MANIFEST, Bundle, claim
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.evaluation import graph_reader
from thanos_deploy.measure.options import BenchRequest, EvalRequest
from thanos_deploy.measure.perplexity import losses_of, perplexity_of
from thanos_deploy.measure.quality import EVAL
from thanos_deploy.measure.run import DENSE, PRUNED, Run
from thanos_deploy.pattern import parse
from thanos_deploy.progress import Announce
from thanos_deploy.report import charts
from thanos_deploy.report.model import Report
from thanos_deploy.report.write import compare
from thanos_deploy.stages.bench import bench, compared
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.evaluate import evaluate
from thanos_deploy.stages.export import export, export_dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.texts import open_text, segments_for

PATTERNS = ("2:4", "unstructured:0.5", "structured:0.1", "structured:0.2", "structured:0.3")
INT8 = "-int8"


def main() -> None:
    """Make, measure, report, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="[default: SmolLM2-135M-Instruct]")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--calib", default=BUILTIN)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-text", default=BUILTIN)
    parser.add_argument("--eval-segments", type=int, default=12)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    _progress.quiet_libraries()
    evaluation = EvalRequest(
        arguments.eval_text, segments=arguments.eval_segments, seqlen=arguments.eval_seqlen
    )
    benchmarking = BenchRequest(
        run="comparison", prompts=tuple(arguments.prompt), rounds=arguments.rounds
    )
    with _progress.announcer(quiet=False) as announce:
        dense = Dense(arguments.model or str(gguf_path()))
        bundles = {}
        for pattern in arguments.patterns:
            request = PruneRequest.of(
                parse(pattern),
                calib=arguments.calib,
                nsamples=arguments.nsamples,
                seqlen=arguments.seqlen,
            )
            folder = arguments.out / pattern.replace(":", "-")
            bundles[folder.name] = make(folder, dense, request, evaluation, announce)
        best = min(bundles, key=lambda name: bundles[name].result(EVAL).value)
        bundles[best + INT8] = rounded_pruned(bundles[best], announce)
        dense_int8 = rounded_dense(dense, arguments.out / (DENSE + INT8), announce)
        first, *others = bundles.values()
        with claim(first.path, first.source) as claimed:
            subjects = compared(
                claimed, [DENSE, *(str(other.path) for other in others)], dense, announce=announce
            )
            subjects[DENSE + INT8] = dense_int8
            run = bench(claimed, subjects, benchmarking, announce=announce)
    report = compare(
        [bundle.path for bundle in bundles.values()],
        arguments.results / "comparison.html",
        overwrite=True,
    )
    (arguments.results / "comparison.svg").write_text(picture(report), encoding="utf-8")
    named = {
        first.path.name if label == PRUNED else label: bundle for label, bundle in subjects.items()
    }
    ids = held_out(dense, evaluation)
    reference = first.inputs(EVAL).dense
    assert reference is not None
    perplexity = {
        DENSE: reference.value,
        **{name: bundle.result(EVAL).value for name, bundle in bundles.items()},
    }
    for name, bundle in named.items():
        if name.endswith(INT8):
            perplexity[name] = once(
                arguments.out / f"{name}-perplexity.json",
                {"graph": bundle.graph_sha256, "ids": ids.tolist()},
                partial(graph_perplexity, bundle.path, ids),
            )
    timing = {
        "prompt": arguments.prompt[0],
        "new_tokens": benchmarking.new_tokens,
        "rounds": arguments.rounds,
    }
    genai = once(
        arguments.out / "genai.json",
        {"graphs": {name: bundle.graph_sha256 for name, bundle in named.items()}, **timing},
        lambda: time_genai(
            {
                name: genai_folder(bundle, arguments.out / f"{name}-genai", dense)
                for name, bundle in named.items()
            },
            **timing,
        ),
    )
    rows = [
        row(name, label, run, perplexity[name], genai[name])
        for name, label in zip(named, subjects, strict=True)
    ]
    result = {
        "status": run.status,
        "reasons": list(run.reasons),
        "quality": encode(report.models[0].quality),
        "rows": rows,
        "environment": encode(environment.describe()),
    }
    files.write_json(arguments.results / "comparison-runtimes.json", result)
    print(markdown(rows, run))


def make(
    folder: Path, dense: Dense, request: PruneRequest, evaluation: EvalRequest, announce: Announce
) -> Bundle:
    """A bundle of a pruned model with its graph for both runtimes."""
    with claim(folder, dense.source) as bundle:
        prune(bundle, dense, request, announce=announce)
        evaluate(bundle, dense, evaluation, announce=announce)
        export(bundle, target="onnx", announce=announce)
        export(bundle, target="genai", announce=announce)
    return bundle


def rounded_pruned(bundle: Bundle, announce: Announce) -> Bundle:
    """A copy of a bundle with int8 weights in its graph."""
    folder = bundle.path.with_name(bundle.path.name + INT8)
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(bundle.path, unfinished, ignore=shutil.ignore_patterns("bench", "report"))
        manifest = json.loads((unfinished / MANIFEST).read_bytes())
        for stage in ("bench", "report"):
            manifest["stages"].pop(stage, None)
        files.write_json(unfinished / MANIFEST, manifest)
        unfinished.rename(folder)
    with claim(folder, bundle.source) as rounded:
        request = ExportRequest("int8")
        for target in ("onnx", "genai"):
            export(rounded, target=target, request=request, overwrite=True, announce=announce)
    return rounded


def rounded_dense(dense: Dense, folder: Path, announce: Announce) -> Bundle:
    """The dense model with int8 weights in its graph, beside the one in the cache."""
    dense.checkpoint(announce)
    beside = copy(dense)
    beside.folder = folder
    export_dense(beside, ExportRequest("int8"), announce)
    return Bundle.open(folder)


def genai_folder(bundle: Bundle, otherwise: Path, dense: Dense) -> Path:
    """Where ORT-GenAI finds the graph of a bundle; made for the dense models, which have none."""
    if "genai" in bundle.stages:
        return bundle.path / "genai"
    shutil.rmtree(otherwise, ignore_errors=True)
    otherwise.mkdir()
    exporters.genai.export(bundle.path / "onnx", dense.checkpoint().folder, otherwise)
    return otherwise


def held_out(dense: Dense, request: EvalRequest) -> Tensor:
    """int64[segments, tokens], what `evaluate` judges on."""
    text = open_text(request.text, request.text_field, held_out=True)
    return segments_for(dense.checkpoint(), text, request.segments, request.seqlen, seed=None)[0]


def graph_perplexity(bundle: Path, ids: Tensor) -> float:
    """Perplexity of an exported graph on ONNX Runtime."""
    return perplexity_of(losses_of(graph_reader(bundle)), ids).value


def time_genai(folders: Mapping[str, Path], *, prompt: int, new_tokens: int, rounds: int) -> Json:
    """Median seconds of a prefill and of a decoded token with ORT-GenAI, in turns."""
    models = {name: onnxruntime_genai.Model(str(folder)) for name, folder in folders.items()}
    ids = np.zeros((1, prompt), dtype=np.int32)  # which tokens they are takes no time
    taken: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in models
    }
    for number in range(rounds + 1):  # the first one warms up
        for name in list(models) if number % 2 else reversed(models):
            parameters = onnxruntime_genai.GeneratorParams(models[name])
            longest = prompt + new_tokens
            parameters.set_search_options(max_length=longest, min_length=longest)
            generator = onnxruntime_genai.Generator(models[name], parameters)
            started = time.perf_counter()
            generator.append_tokens(ids)
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                generator.generate_next_token()
            if number:
                taken[name]["prefill"].append(first - started)
                taken[name]["decode"].append((time.perf_counter() - first) / (new_tokens - 1))
    return {
        name: {what: float(np.median(seconds)) for what, seconds in samples.items()}
        for name, samples in taken.items()
    }


def row(name: str, label: str, run: Run, perplexity: float, genai: Json) -> Json:
    """The figures of one model."""
    facts = run.subjects[label]
    times = {}
    for scenario in run.scenarios:
        result = scenario.results[label]
        ratio = result.ratio.get(scenario.headline)
        times[scenario.name] = {
            "median_seconds": result.metrics[scenario.headline].median,
            "ratio": None if ratio is None else encode(ratio),
        }
    return {
        "model": name,
        "perplexity": perplexity,
        "onnxruntime": times,
        "genai_median_seconds": genai,
        "peak_memory_bytes": facts.peak_bytes,
        "onnx_bytes": facts.file_bytes,
    }


def picture(report: Report) -> str:
    """Perplexity against time and size as a file of its own, in the colours of the page."""
    style = resources.files("thanos_deploy.report").joinpath("page.css").read_text()
    colours = style[: style.index("\n* {")]
    return (
        str(charts.pareto(report.pareto))
        .replace(
            "<svg ",
            '<svg xmlns="http://www.w3.org/2000/svg" style="background: var(--paper); '
            'font-family: sans-serif" ',
            1,
        )
        .replace("<title>", f"<style>{colours}</style><title>", 1)
    )


def markdown(rows: list[Json], run: Run) -> str:
    """The table of docs/choose.md."""
    scenarios = [scenario.name for scenario in run.scenarios]
    heads = (
        *("model", "perplexity", *(f"{name}, ms" for name in scenarios)),
        *("ORT-GenAI prefill, ms", "ORT-GenAI decode, ms", "peak memory, MB", "ONNX, MB"),
    )
    lines = [heads, ("---",) * len(heads)]
    for one in rows:
        times = []
        for name in scenarios:
            measured = one["onnxruntime"][name]
            ratio = measured["ratio"]
            times.append(f"{measured['median_seconds'] * 1e3:.1f}")
            if ratio is not None:
                span = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
                times[-1] += f", {ratio['estimate']:.2f} ({span})"
        genai = one["genai_median_seconds"]
        lines.append(
            (
                one["model"],
                f"{one['perplexity']:.2f}",
                *times,
                *(f"{genai[what] * 1e3:.1f}" for what in ("prefill", "decode")),
                *(f"{one[size] / 1e6:.0f}" for size in ("peak_memory_bytes", "onnx_bytes")),
            )
        )
    status = "" if run.status == "VALID" else f"\n\n{run.status}: {'; '.join(run.reasons)}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + status


def once(path: Path, inputs: Json, compute: Callable[[], Any]) -> Any:
    """A result that is kept in a file, computed unless it is there and of the same inputs."""
    key = files.sha256_of(inputs)
    if path.exists():
        kept = json.loads(path.read_bytes())
        if kept["inputs"] == key:
            return kept["value"]
    value = compute()
    files.write_json(path, {"inputs": key, "value": value})
    return value


if __name__ == "__main__":
    main()
