"""What a run showed, dense beside pruned, as one JSON-ready value and a verdict in words."""

from dataclasses import asdict, dataclass

from thanos_deploy.artifact import Bundle, Json, StageRecord
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, parse

FORMAT = 2

_NO_GPU = "not measured (no GPU)"


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast the pruned model is as the dense one, and where 95 % of that lies."""

    estimate: float
    low: float
    high: float
    rounds: int


def quoted(bench: StageRecord) -> Json | None:
    """The latest run that times prefill and decode of the pruned and the dense model, if any."""
    fitting = [
        run
        for run in bench.result.get("runs", {}).values()
        if run["baseline"] == "dense"
        and "pruned" in run["subjects"]
        and {"prefill", "decode"} <= {scenario["kind"] for scenario in run["scenarios"]}
    ]
    return fitting[-1] if fitting else None


def build(bundle: Bundle, dense: Bundle) -> Json:
    """Collect what the finished stages of a bundle and of its dense model say.

    Args:
        bundle: with the stages prune, eval, onnx and bench finished, and a run that `quoted`
            finds.
        dense: the bundle of the dense model, with eval and onnx finished.
    """
    prune, evaluation = bundle.stages["prune"], bundle.stages["eval"]
    onnx, bench = bundle.stages["onnx"], bundle.stages["bench"]
    pattern = parse(prune.options["pattern"])
    run = quoted(bench)
    assert run is not None
    scenarios = {
        kind: next(one for one in run["scenarios"] if one["kind"] == kind)
        for kind in ("prefill", "decode")
    }
    latency = {
        label: {
            **{what: one["results"][label]["metrics"][what] for what, one in scenarios.items()},
            "load_seconds": run["subjects"][label]["load_seconds"],
        }
        for label in ("dense", "pruned")
    }
    faster = {
        what: _speedup(one["results"]["pruned"]["ratio"][what], run["rounds"])
        for what, one in scenarios.items()
    }
    perplexity = {
        "dense": dense.stages["eval"].result["value"],
        "pruned": evaluation.result["value"],
    }
    widths = _widths(prune)
    packed = _packed_bytes(bundle)
    return {
        "format": FORMAT,
        "source": bundle.source,
        "pattern": str(pattern),
        "method": prune.options["method"],
        "verdict": [
            *(
                shrunk_verdict(widths, faster, perplexity)
                if widths
                else verdict(pattern, faster, perplexity, holds=prune.result["pattern_holds"])
            ),
            *(f"The timing is INVALID: {reason}." for reason in run["reasons"]),
            *(
                f"Packed, without its zeros, the checkpoint takes "
                f"{size['pruned'] / size['dense']:.3f} of the dense one's bytes."
                for size in packed.values()
            ),
        ],
        "quality": {
            "measure": "perplexity",
            "text": evaluation.result["text"],
            "segments": evaluation.result["segments"],
            "length": evaluation.result["length"],
            **perplexity,
        },
        "linear_layers": _layers(prune),
        "widths": widths,
        "bytes": {
            "model": {
                "dense": prune.result["dense_bytes"],
                "pruned": _bytes(prune, ".safetensors"),
            },
            "onnx": {
                "dense": _bytes(dense.stages["onnx"], ".onnx", ".data"),
                "pruned": _bytes(onnx, ".onnx", ".data"),
            },
            **packed,
        },
        "latency": {
            "backend": f"ONNX Runtime, {run['provider']}",
            "status": run["status"],
            "batch": scenarios["prefill"]["batch"],
            "prompt": scenarios["prefill"]["prompt"],
            "past": scenarios["decode"]["past"],
            "new_tokens": scenarios["decode"]["new_tokens"],
            **latency,
            "speedup": {what: asdict(value) for what, value in faster.items()},
            "gpu": _NO_GPU,
        },
        "peak_memory_bytes": {
            label: run["subjects"][label]["peak_bytes"] for label in ("dense", "pruned")
        },
        "parity": {
            "limit": onnx.result["parity_limit"],
            "cases": len(onnx.result["parity"]),
            "worst": max(
                max(case["logits_error"], case["cache_error"]) for case in onnx.result["parity"]
            ),
        },
        "sample": bench.result["sample"],
        "seconds": {
            name: record.seconds for name, record in bundle.stages.items() if name != "report"
        },
        "options": {
            name: record.options for name, record in bundle.stages.items() if record.options
        },
        "environment": run["environment"],
    }


def verdict(
    pattern: Pattern, faster: dict[str, Speedup], perplexity: dict[str, float], *, holds: bool
) -> list[str]:
    """What the numbers mean, one sentence each.

    Args:
        pattern: what was pruned to.
        faster: speed of "prefill" and "decode" on ONNX Runtime's CPU provider, dense = 1.
        perplexity: of the "dense" and the "pruned" model.
        holds: every pruned layer keeps the pattern everywhere.
    """
    sentences = [
        f"Perplexity went from {perplexity['dense']:.2f} to {perplexity['pruned']:.2f}.",
        f"Measured on this CPU, prefill ran at {_times(faster['prefill'])} and decode at "
        f"{_times(faster['decode'])} the dense model's speed.",
        f"{pattern} brings no speed on a CPU: ONNX Runtime has no sparse CPU kernels, so it reads "
        "and multiplies the zeros like any other number; a difference from 1.00x has other causes.",
        "The files are no smaller either, because the zeros are stored like any other number.",
    ]
    match pattern:
        case Structured():
            sentences[2:4] = [
                "The removed columns are zero, but the matrices keep their shapes (--keep-shape), "
                "so nothing is faster or smaller: that needs heads and channels to be cut out."
            ]
        case SemiStructured() if not holds:
            sentences.append(
                "The pattern does not hold in every row (outlier rows were left dense), so sparse "
                "tensor cores do not take these layers as they are."
            )
        case SemiStructured(2, 4):
            sentences.append(
                "What would be faster: sparse tensor cores (NVIDIA, compute capability 8.0 or "
                "later) through TensorRT with sparse weights allowed, for prefill and large "
                "batches; on any machine, structured pruning, which makes the matrices smaller. "
                f"On a GPU: {_NO_GPU}."
            )
        case _:
            sentences.append(
                f"No sparse tensor core takes {pattern} (they take 2:4 only), so a GPU does not "
                "change this; structured pruning, which makes the matrices smaller, would."
            )
    return sentences


def shrunk_verdict(
    widths: Json, faster: dict[str, Speedup], perplexity: dict[str, float]
) -> list[str]:
    """What the numbers of a model mean that had heads and channels cut out, one sentence each.

    Args:
        widths: as in the report.
        faster, perplexity: see `verdict`.
    """
    sentences = [
        f"Perplexity went from {perplexity['dense']:.2f} to {perplexity['pruned']:.2f}.",
        f"{widths['removed']:.1%} of the blocks' parameters are gone for good: the files, the "
        "memory and the work of every block are smaller by that, on any machine and any backend; "
        "embeddings and the output head are as they were.",
        f"Measured on this CPU, prefill ran at {_times(faster['prefill'])} and decode at "
        f"{_times(faster['decode'])} the dense model's speed. On a GPU: {_NO_GPU}.",
    ]
    if widths["stock_config"]:
        sentences.append(
            "The result is an ordinary smaller checkpoint: stock loaders take it as it is."
        )
    else:
        sentences.append(
            "No stock config.json describes these widths, so model/ is for thanos-deploy only "
            "(widths.json declares them); the ONNX graph runs anywhere."
        )
    return sentences


def _layers(prune: StageRecord) -> Json:
    return {
        name: prune.result[name]
        for name in (
            "layers",
            "weights",
            "sparsity",
            "pattern_holds",
            "layers_off_pattern",
            "median_relative_error",
            "worst_relative_error",
            "worst_layer",
            "largest_damping",
        )
        if name in prune.result
    }


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


def _times(speedup: Speedup) -> str:
    return (
        f"{speedup.estimate:.2f}x ({speedup.low:.2f}x to {speedup.high:.2f}x in "
        f"{speedup.rounds} rounds)"
    )


def _speedup(ratio: Json, rounds: int) -> Speedup:
    """The inverse of a ratio of times."""
    return Speedup(1 / ratio["estimate"], 1 / ratio["high"], 1 / ratio["low"], rounds)


def _packed_bytes(bundle: Bundle) -> dict[str, dict[str, int]]:
    """The packed checkpoint beside the dense one, if it was made."""
    if "packed" not in bundle.stages:
        return {}
    packed = bundle.stages["packed"]
    return {
        "packed": {
            "dense": bundle.stages["prune"].result["dense_bytes"],
            "pruned": _bytes(packed, ".safetensors"),
        }
    }


def _bytes(record: StageRecord, *endings: str) -> int:
    return sum(file.bytes for name, file in record.files.items() if name.endswith(endings))
