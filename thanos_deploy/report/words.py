"""What the figures of a report mean, in sentences."""

from collections.abc import Iterator, Sequence

from thanos_deploy.artifact import Json
from thanos_deploy.pattern import SemiStructured, Structured, parse
from thanos_deploy.report.runs import quoted_times

NO_GPU = "not measured (no GPU)"

# Stage -> what it measures, and the command that does it.
_STAGES = {
    "eval": ("perplexity", "thanos-deploy eval OUT --dense MODEL"),
    "onnx": ("the ONNX graph and its agreement with PyTorch", "thanos-deploy export OUT"),
    "bench": ("latency and memory", "thanos-deploy bench OUT --dense MODEL"),
    "packed": ("the packed size", "thanos-deploy export OUT --target packed"),
    "genai": ("ORT-GenAI", "thanos-deploy export OUT --target genai"),
}


def title(models: Sequence[Json]) -> str:
    """What a report is about."""
    names = ", ".join(dict.fromkeys(model["source"]["name"] for model in models))
    if len(models) > 1:
        return f"{names}: {len(models)} models side by side"
    return f"{names}, {models[0]['pattern']} with {models[0]['method']}"


def headline(model: Json, run: Json | None) -> str:
    """What came out, in one sentence."""
    clauses = []
    if quality := model["quality"]:
        clauses.append(
            f"perplexity went from {quality['dense']:.2f} to {quality['pruned']:.2f} "
            f"({quality['ratio']:.2f}x)"
        )
    else:
        clauses.append("the perplexity was not measured")
    size = model["bytes"].get("onnx") or model["bytes"]["model"]
    if size["dense"]:
        clauses.append(f"the files take {size['pruned'] / size['dense']:.2f}x the bytes")
    times = [f"{name} {_outcome(ratio)}" for name, ratio in quoted_times(run)]
    if run is None or not times:
        clauses.append("latency was not measured")
    else:
        where = "on this CPU" if run["provider"] == "CPUExecutionProvider" else run["provider"]
        clauses.append(f"{where}, {' and '.join(times)}")
        if run["status"] != "VALID":
            clauses.append(f"but that run is {run['status']}")
    return f"{model['pattern']} with {model['method']}: {'; '.join(clauses)}."


def comparison(models: Sequence[Json], plots: Sequence[Json]) -> str:
    """What came out of several models, in one sentence."""
    points = [point for plot in plots for point in plot["points"]]
    if not points:
        return f"{len(models)} models, of which nothing was measured that can be compared."
    fronts = {
        model["label"]: [not p["dominated_by"] for p in points if p["label"] == model["label"]]
        for model in models
    }
    clauses = []
    for labels, verb in (
        ([label for label, front in fronts.items() if front and all(front)], "unbeaten throughout"),
        (
            [label for label, front in fronts.items() if any(front) and not all(front)],
            "beaten in part",
        ),
        (
            [label for label, front in fronts.items() if front and not any(front)],
            "beaten throughout",
        ),
        ([label for label, front in fronts.items() if not front], "not comparable"),
    ):
        if labels:
            clauses.append(f"{verb}: {', '.join(labels)}")
    doubt = (
        "" if all(p["valid"] for p in points) else " (some times are from runs that do not count)"
    )
    costs = ", ".join(plot["cost"] for plot in plots)
    return f"By perplexity against {costs}{doubt}, {'; '.join(clauses)}."


def notices(model: Json) -> Iterator[str]:
    """What must not be overlooked."""
    for run in model["bench"]:
        if run["status"] != "VALID":
            reasons = "; ".join(run["reasons"]) or "no reason was recorded"
            yield (
                f"{run['status']}: the timing run {run['run']!r} of {model['label']} does not "
                f"count ({reasons})."
            )
    for stage in model["stale"]:
        yield (
            f"Stage {stage!r} of {model['label']} was made from an earlier model and is left out; "
            "repeat it with --overwrite."
        )


def not_measured(model: Json, run: Json | None) -> list[Json]:
    """What a reader may look for in vain: what, why, and the command that changes it."""
    missing: list[Json] = [
        {"what": what, "why": "not measured", "command": command}
        for stage, (what, command) in _STAGES.items()
        if stage not in model["seconds"] and _applies(stage, model)
    ]
    runs = [run for run in model["bench"] if run["status"] != "INTERRUPTED"]
    if all(run["provider"] == "CPUExecutionProvider" for run in runs):
        missing.append({"what": "latency and memory on a GPU", "why": NO_GPU, "command": None})
    if not model["kernels"]:
        missing.append(
            {
                "what": "which layers run on sparse kernels",
                "why": "no engine was built",
                "command": "thanos-deploy export OUT --target tensorrt",
            }
        )
    kinds = {scenario["kind"] for run in runs for scenario in run["scenarios"]}
    for kind, what in (("generate", "whole answers"), ("open-loop", "requests that arrive freely")):
        if runs and kind not in kinds:
            missing.append(
                {
                    "what": f"latency of {what}",
                    "why": "not measured",
                    "command": "thanos-deploy bench OUT --dense MODEL",
                }
            )
    if (model["export"] or {}).get("dtype", "fp32") != "fp32" and model["quality"]:
        missing.append(
            {
                "what": f"perplexity of the {model['export']['dtype']} graph itself",
                "why": "the perplexity is the checkpoint's, in PyTorch",
                "command": None,
            }
        )
    missing.append(
        {
            "what": "quality on tasks: knowledge, reasoning, instructions",
            "why": "perplexity only; judge the model on your own task",
            "command": None,
        }
    )
    return missing


def verdict(model: Json, run: Json | None) -> list[str]:
    """What the figures of one model mean, one sentence each."""
    pattern = parse(model["pattern"])
    sentences = []
    if quality := model["quality"]:
        sentences.append(f"Perplexity went from {quality['dense']:.2f} to {quality['pruned']:.2f}.")
    if model["widths"]:
        sentences += _of_cuts(model["widths"])
    times = [_measured(name, ratio) for name, ratio in quoted_times(run)]
    if run is not None and times:
        machine = run["environment"]["processor"]
        sentences.append(
            f"Measured with {run['backend']}, {run['provider']}, on {machine}: {'; '.join(times)} "
            "the dense model's time."
        )
        if run["status"] != "VALID":
            sentences.append(
                f"That run is {run['status']} ({'; '.join(run['reasons'])}): repeat it before its "
                "times are used."
            )
    if not model["widths"]:
        match pattern:
            case Structured():
                sentences.append(
                    "The removed columns are zero, but the matrices keep their shapes "
                    "(--keep-shape), so nothing is faster or smaller: that needs heads and "
                    "channels to be cut out."
                )
            case _:
                sentences += [
                    f"{pattern} brings no speed on a CPU: ONNX Runtime has no sparse CPU kernels, "
                    "so it reads and multiplies the zeros like any other number; a difference from "
                    "1.00x has other causes.",
                    "The files are no smaller either, because the zeros are stored like any other "
                    "number.",
                ]
        match pattern:
            case SemiStructured() if not model["linear_layers"]["pattern_holds"]:
                sentences.append(
                    "The pattern does not hold in every row (outlier rows were left dense), so "
                    "sparse tensor cores do not take these layers as they are."
                )
            case SemiStructured(2, 4):
                sentences.append(
                    "What would be faster: sparse tensor cores (NVIDIA, compute capability 8.0 or "
                    "later) through TensorRT with sparse weights allowed, for prefill and large "
                    "batches; on any machine, structured pruning, which makes the matrices "
                    f"smaller. On a GPU: {NO_GPU}."
                )
            case Structured():
                pass
            case _:
                sentences.append(
                    f"No sparse tensor core takes {pattern} (they take 2:4 only), so a GPU does "
                    "not change this; structured pruning, which makes the matrices smaller, would."
                )
    if packed := model["bytes"].get("packed"):
        sentences.append(
            "Packed, without its zeros, the checkpoint takes "
            f"{packed['pruned'] / packed['dense']:.3f} of the dense one's bytes."
        )
    return sentences


def interval(ratio: Json) -> str:
    """A ratio with its confidence interval."""
    return f"{ratio['estimate']:.2f}x ({ratio['low']:.2f}x to {ratio['high']:.2f}x)"


def _of_cuts(widths: Json) -> list[str]:
    """What cutting heads and channels out means."""
    return [
        f"{widths['removed']:.1%} of the blocks' parameters are gone for good: the files, the "
        "memory and the work of every block are smaller by that, on any machine and any backend; "
        "embeddings and the output head are as they were.",
        "The result is an ordinary smaller checkpoint: stock loaders take it as it is."
        if widths["stock_config"]
        else "No stock config.json describes these widths, so model/ is for thanos-deploy only "
        "(widths.json declares them); the ONNX graph runs anywhere.",
    ]


def _outcome(ratio: Json) -> str:
    """What an interval shows."""
    if ratio["high"] < 1.0 or ratio["low"] > 1.0:
        return f"takes {interval(ratio)} the time"
    return f"shows no difference ({ratio['low']:.2f}x to {ratio['high']:.2f}x the time)"


def _measured(name: str, ratio: Json) -> str:
    return f"{name} took {interval(ratio)}"


def _applies(stage: str, model: Json) -> bool:
    """Packing is for n:m that holds everywhere."""
    if stage != "packed":
        return True
    semi = isinstance(parse(model["pattern"]), SemiStructured)
    return semi and bool(model["linear_layers"].get("pattern_holds"))
