"""The report of one bundle or of several side by side, as one JSON-ready value."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from exporters import targets
from thanos_deploy import __version__
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import StageRecord
from thanos_deploy.errors import UsageError
from thanos_deploy.pattern import parse
from thanos_deploy.report import commands, loaders, pareto, words
from thanos_deploy.report.runs import DENSE, quoted
from thanos_deploy.report.sources import Sources

FORMAT = "thanos-deploy/report/1"

_TOKENIZER = "model/tokenizer.json"

# What the manifest has of a pruned checkpoint.
_LINEAR_LAYERS = (
    "layers",
    "weights",
    "sparsity",
    "patterns",
    "layers_left_dense",
    "pattern_holds",
    "layers_off_pattern",
    "retries",
    "median_relative_error",
    "worst_relative_error",
    "worst_layer",
    "largest_damping",
)


def build(bundles: Sequence[Sources], *, allow_different_models: bool = False) -> Json:
    """What some bundles show; report.schema.json describes every entry.

    Args:
        bundles: one or more.
        allow_different_models: also of different base models or tokenizers.

    Raises:
        UsageError: they are of different base models or tokenizers, and that is not allowed.
    """
    if not allow_different_models:
        _require_one_model(bundles)
    models = [
        _model(sources, label) for sources, label in zip(bundles, _labels(bundles), strict=True)
    ]
    plots = pareto.plots(models) if len(models) > 1 else []
    return {
        "format": FORMAT,
        "made_with": __version__,
        "title": words.title(models),
        "headline": words.comparison(models, plots) if len(models) > 1 else models[0]["headline"],
        "notices": [*_differences(models), *(text for m in models for text in words.notices(m))],
        "models": models,
        "pareto": plots,
    }


def _model(sources: Sources, label: str) -> Json:
    stages = sources.stages
    prune = stages["prune"]
    pattern = parse(prune.options["pattern"])
    model = {
        "label": label,
        "source": sources.bundle.source,
        "pattern": str(pattern),
        "method": prune.options["method"],
        "quality": _quality(stages.get("eval")),
        "graph_quality": _quality(stages.get("eval-onnx")),
        "tasks": [
            *_tasks(stages.get("eval-tasks"), "torch"),
            *_tasks(stages.get("eval-tasks-onnx"), "onnx"),
        ],
        "linear_layers": {
            name: prune.result[name] for name in _LINEAR_LAYERS if name in prune.result
        },
        "layer_map": _layer_map(sources.blocks),
        "widths": _widths(prune),
        "loaders": _loaders(sources),
        "bytes": _bytes(sources),
        "parts": prune.result.get("parts"),
        "export": _export(stages.get("onnx"), sources.weights),
        "bench": [
            {**_without_samples(run), **_doubt(sources, name)} for name, run in sources.runs.items()
        ],
        "kernels": list(sources.engines.values()),
        "sample": sources.sample,
        "stale": list(sources.stale),
        "commands": commands.of(sources),
        "seconds": {name: record.seconds for name, record in stages.items()},
        "options": {name: record.options for name, record in stages.items() if record.options},
        "environment": prune.environment,
    }
    run = quoted(model)
    return {
        **model,
        "quoted_run": None if run is None else run["run"],
        "headline": words.headline(model, run),
        "verdict": words.verdict(model, run),
        "not_measured": words.not_measured(model),
    }


def _labels(bundles: Sequence[Sources]) -> list[str]:
    """A short name for each; as much of pattern, dtype, method and folder as tells them apart."""
    parts = [
        [
            sources.stages["prune"].options["pattern"],
            sources.stages["onnx"].options.get("dtype", "fp32")
            if "onnx" in sources.stages
            else "fp32",
            sources.stages["prune"].options["method"],
            sources.bundle.path.resolve().name,
        ]
        for sources in bundles
    ]
    for length in range(1, len(parts[0]) + 1):
        labels = [" ".join(part[:length]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, start=1)]


def _require_one_model(bundles: Sequence[Sources]) -> None:
    first = bundles[0]
    for other in bundles[1:]:
        for what, values in (
            ("base models", [s.bundle.source["sha256"] for s in (first, other)]),
            (
                "tokenizers",
                [
                    getattr(s.stages["prune"].files.get(_TOKENIZER), "sha256", None)
                    for s in (first, other)
                ],
            ),
        ):
            if values[0] != values[1]:
                raise UsageError(
                    f"{first.bundle.path} and {other.bundle.path} have different {what}: "
                    f"{first.bundle.source['name']} ({str(values[0])[:12]}) and "
                    f"{other.bundle.source['name']} ({str(values[1])[:12]})",
                    fix="compare bundles of one model, or give --allow-different-models; "
                    "perplexities over different tokenizers cannot be compared",
                )


def _differences(models: Sequence[Json]) -> Iterator[str]:
    """What keeps models from being compared figure by figure."""
    if len({model["source"]["sha256"] for model in models}) > 1:
        yield "The base models differ, so differences are not those of the patterns alone."
    texts = {
        (quality["text"], quality["segments"], quality["length"], *quality["frame"])
        for model in models
        if (quality := model["quality"])
    }
    if len(texts) > 1:
        yield "The perplexities are of different texts or lengths and cannot be compared."
    machines = {
        (run["environment"]["processor"], run["environment"]["cores"])
        for model in models
        if (run := quoted(model))
    }
    if len(machines) > 1:
        yield "Latency was measured on different machines: compare ratios, not milliseconds."


def _quality(evaluation: StageRecord | None) -> Json | None:
    if evaluation is None:
        return None
    dense = evaluation.inputs["dense"]["value"]
    pruned = evaluation.result["value"]
    return {
        "measure": "perplexity",
        "text": evaluation.result["text"],
        "segments": evaluation.result["segments"],
        "length": evaluation.result["length"],
        # Results from before segments had one are of segments without.
        "frame": evaluation.result.get("frame", {"tokens": []})["tokens"],
        "dense": dense,
        "pruned": pruned,
        "ratio": pruned / dense,
    }


def _tasks(evaluation: StageRecord | None, runtime: str) -> Iterator[Json]:
    """The scores of the dense and the pruned model in each task."""
    if evaluation is None:
        return
    scores = evaluation.inputs["dense"]["scores"], evaluation.result["scores"]
    for dense, pruned in zip(*scores, strict=True):
        yield {
            **{name: pruned[name] for name in ("task", "metric", "samples")},
            "runtime": runtime,
            "dense": dense["value"],
            "pruned": pruned["value"],
            "dense_stderr": dense["stderr"],
            "pruned_stderr": pruned["stderr"],
        }


def _layer_map(blocks: Sequence[Json]) -> Json:
    """Error and share of what is gone, block by block."""
    if "layers" in blocks[0]:
        columns = [_short(layer["name"]) for layer in blocks[0]["layers"]]
        error = [[layer["relative_error"] for layer in block["layers"]] for block in blocks]
        gone = [[layer["sparsity"] for layer in block["layers"]] for block in blocks]
    else:
        columns = ["heads", "channels"]
        error = [[block["heads_error"], block["channels_error"]] for block in blocks]
        gone = [
            [1.0 - block["after"][part] / block["before"][part] for part in columns]
            for block in blocks
        ]
    return {"columns": columns, "error": error, "gone": gone}


def _short(name: str) -> str:
    """A linear layer's name seen from its block, from its full name."""
    parts = name.split(".")
    number = max(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])


def _widths(prune: StageRecord) -> Json | None:
    """What was cut out; None if all shapes are the dense model's."""
    widths = prune.result.get("widths")
    if widths is None:
        return None
    cuts = {
        part: {
            who: sorted({block[who][part] for block in widths["blocks"]})
            for who in ("before", "after")
        }
        for part in ("heads", "kv_heads", "channels")
    }
    figures = ("removed", "stock_config", "block_parameters_before", "block_parameters_after")
    return {**{name: widths[name] for name in figures}, **cuts}


def _loaders(sources: Sources) -> list[Json]:
    """What other loaders make of the checkpoint; none if its configuration is not all of it."""
    widths = sources.stages["prune"].result.get("widths")
    if sources.config is None or (widths is not None and not widths["stock_config"]):
        return []
    return [asdict(verdict) for verdict in loaders.judge(sources.config)]


def _bytes(sources: Sources) -> Json:
    """Sizes of the files of the dense and the pruned model; None where it was not seen."""
    prune = sources.stages["prune"]
    sizes = {
        "model": {
            "dense": prune.result["dense_bytes"],
            "pruned": _size(prune, ".safetensors"),
        }
    }
    graphs = [
        run["subjects"][DENSE]["file_bytes"]
        for run in sources.runs.values()
        if DENSE in run["subjects"]
    ]
    dense = {
        "checkpoint": prune.result["dense_bytes"],
        "graph": graphs[-1] if graphs else None,
    }
    exported = [
        (target.name, target.size, sources.stages[target.name])
        for target in targets.every()
        if target.size is not None and target.name in sources.stages
    ]
    for name, size, record in sorted(exported, key=lambda found: found[1].beside):
        sizes[name] = {"dense": dense[size.beside], "pruned": _size(record, *size.endings)}
    return sizes


def _size(record: StageRecord, *endings: str) -> int:
    return sum(file.bytes for name, file in record.files.items() if name.endswith(endings))


def _export(onnx: StageRecord | None, weights: Sequence[Json]) -> Json | None:
    if onnx is None:
        return None
    cases = onnx.result["parity"]
    judged = [weight["pattern_holds"] for weight in weights if weight["pattern_holds"] is not None]
    return {
        "dtype": onnx.options.get("dtype", "fp32"),
        "rounding": onnx.result.get("rounding", {}),
        "weights": len(weights),
        "weights_on_pattern": sum(judged) if judged else None,
        "parity": {
            "limit": onnx.result["parity_limit"],
            "cases": len(cases),
            "worst": max(max(case["logits_error"], case["cache_error"]) for case in cases),
        },
    }


def _without_samples(run: Json) -> Json:
    """A run as in its file, but for the raw samples."""
    return {
        **run,
        "scenarios": [
            {
                **scenario,
                "results": {
                    subject: {
                        **result,
                        "metrics": {
                            name: {key: value for key, value in metric.items() if key != "samples"}
                            for name, metric in result["metrics"].items()
                        },
                    }
                    for subject, result in scenario["results"].items()
                },
            }
            for scenario in run["scenarios"]
        ],
    }


def _doubt(sources: Sources, name: str) -> Json:
    """What is to be said of a finished run that the manifest does not have."""
    run = sources.runs[name]
    if name not in sources.unrecorded or run["status"] == "INTERRUPTED":
        return {}
    return {
        "status": "INVALID",
        "reasons": [
            *run["reasons"],
            f"{name} is not in the manifest, so it may be of another model",
        ],
    }
