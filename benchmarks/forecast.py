"""Compare forecasts with published figures, and fit the five constants of the forecast.

Usage: python -m benchmarks.forecast

The constants are fitted to the figures marked "fit" and to no other; the rest are predictions. If
the setting of a figure was not published, the assumed setting is named. "Recalled" means that the
paper was not read again. The last line is JSON.

Most of the file is the table of these figures, so it is longer than others.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thanos_deploy.forecast.datasheets import find
from thanos_deploy.forecast.forecast import Variant, architecture, forecast
from thanos_deploy.forecast.roofline import (
    FITTED,
    Architecture,
    Efficiency,
    Gemm,
    Layer,
    Setting,
    Step,
    layer,
    product,
)
from thanos_deploy.model.checkpoint import Checkpoint

# Configurations of the models in the figures; a GPT-J block has the layout of a GPT-NeoX block.
LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, object]] = {
    "LLaMA-7B": LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "LLaMA-13B": LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "GPT-J 6B": {
        "model_type": "gpt_neox",
        "vocab_size": 50400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Llama-3-8B": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Minitron-4B": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}

TRT_LLM = "TensorRT-LLM docs/source/performance.md, v0.5"
LMDEPLOY = "lmdeploy docs/en/benchmark/a100_fp16.md"


@dataclass(frozen=True, slots=True)
class Prediction:
    """A forecast of seconds, of tokens per second, or of a ratio of speeds.

    Attributes:
        likely: the forecast to compare with the published figure.
        best: the forecast for ideal 2:4 kernels.
    """

    likely: float
    best: float


@dataclass(frozen=True, slots=True)
class Figure:
    """A published figure.

    Attributes:
        what: what was measured.
        source: where the figure was published.
        published: the figure, in `unit`.
        unit: "ms", "tok/s" or "x".
        predict: returns the forecast of the figure, in `unit`, for given constants.
        fit: whether the constants are fitted to this figure.
    """

    what: str
    source: str
    published: float
    unit: str
    predict: Callable[[Efficiency], Prediction]
    fit: bool = False


@cache
def sizes(model: str) -> Architecture:
    """Return the architecture of one of `MODELS`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        return architecture(Checkpoint.outline(Path(folder)))


def total(layers: tuple[Layer, ...]) -> Prediction:
    """Return the seconds of a forward pass: the sum over its layers."""
    return Prediction(sum(one.likely for one in layers), sum(one.best for one in layers))


def time_of(
    model: str, gpu: str, dtype: str, batch: int, prompt: int, new: int, *, sparse: bool = False
) -> Callable[[Efficiency], Prediction]:
    """Return a forecast of the seconds to read a prompt and generate `new` tokens.

    With `new` = 0 it is the time of one decode step after a past of `prompt` tokens.
    """

    def predict(efficiency: Efficiency) -> Prediction:
        setting = Setting(find(gpu), dtype, efficiency=efficiency)
        variant = Variant("", sizes(model), sparse)
        decode = total(forecast(variant, Step(batch, 1, prompt + new // 2), setting))
        if new == 0:
            return decode
        prefill = total(forecast(variant, Step(batch, prompt, 0), setting))
        return Prediction(
            prefill.likely + (new - 1) * decode.likely, prefill.best + (new - 1) * decode.best
        )

    return predict


def milliseconds(predict: Callable[[Efficiency], Prediction]) -> Callable[[Efficiency], Prediction]:
    """Convert a forecast from seconds to milliseconds."""
    return lambda efficiency: Prediction(
        predict(efficiency).likely * 1e3, predict(efficiency).best * 1e3
    )


def throughput(
    model: str, gpu: str, dtype: str, batch: int, prompt: int, new: int
) -> Callable[[Efficiency], Prediction]:
    """Return a forecast of generated tokens per second, over all sequences of the batch."""
    predict = time_of(model, gpu, dtype, batch, prompt, new)
    tokens = batch * max(new, 1)
    return lambda efficiency: Prediction(
        tokens / predict(efficiency).likely, tokens / predict(efficiency).best
    )


def gain(
    slow: Callable[[Efficiency], Prediction], fast: Callable[[Efficiency], Prediction]
) -> Callable[[Efficiency], Prediction]:
    """Return a forecast of the speed-up of `fast` over `slow`."""

    def predict(efficiency: Efficiency) -> Prediction:
        dense, other = slow(efficiency).likely, fast(efficiency)
        return Prediction(dense / other.likely, dense / other.best)

    return predict


def sparse_gain(
    model: str, gpu: str, dtype: str, batch: int, prompt: int, new: int
) -> Callable[[Efficiency], Prediction]:
    """Return a forecast of the speed-up of a model by 2:4 weights."""
    arguments = (model, gpu, dtype, batch, prompt, new)
    return gain(time_of(*arguments), time_of(*arguments, sparse=True))


def product_gain(
    gpu: str, dtype: str, m: int, n: int, k: int
) -> Callable[[Efficiency], Prediction]:
    """Return a forecast of the speed-up of one matrix product by 2:4 weights."""

    def predict(efficiency: Efficiency) -> Prediction:
        setting = Setting(find(gpu), dtype, efficiency=efficiency)
        kernel = product(Gemm("", n, k), m, dtype)
        dense = layer(kernel, setting, sparse=False).likely
        sparse = layer(kernel, setting, sparse=True)
        return Prediction(dense / sparse.likely, dense / sparse.best)

    return predict


def first_token(
    model: str, gpu: str, dtype: str, prompt: int, published: float, *, fit: bool = False
) -> Figure:
    """Return a figure from TensorRT-LLM's table of first-token latencies."""
    what = f"{model}, {gpu} {dtype}, batch 1: first token after {prompt}"
    predict = milliseconds(time_of(model, gpu, dtype, 1, prompt, 1))
    return Figure(what, TRT_LLM, published, "ms", predict, fit)


def tokens_a_second(
    model: str,
    gpu: str,
    dtype: str,
    batch: int,
    prompt: int,
    new: int,
    *,
    source: str,
    published: float,
    fit: bool = False,
) -> Figure:
    """Return a published throughput together with its forecast; see `throughput`."""
    what = f"{model}, {gpu} {dtype}, batch {batch}, {prompt} + {new} tokens"
    predict = throughput(model, gpu, dtype, batch, prompt, new)
    return Figure(what, source, published, "tok/s", predict, fit)


FIGURES = (
    first_token("LLaMA-7B", "A100", "fp16", 2048, 133, fit=True),
    first_token("LLaMA-7B", "L40S", "fp8", 2048, 73, fit=True),
    first_token("LLaMA-7B", "H100", "fp8", 2048, 36, fit=True),
    tokens_a_second(
        "LLaMA-7B", "A100", "fp16", 1, 128, 2048, source=LMDEPLOY, published=98.92, fit=True
    ),
    tokens_a_second(
        "LLaMA-13B", "A100", "fp16", 1, 128, 2048, source=LMDEPLOY, published=55.29, fit=True
    ),
    Figure(
        "2:4: 3072 x 3072 x 10240, A100 fp16",
        "pytorch/tutorials#2574",
        1.38,
        "x",
        product_gain("A100", "fp16", 3072, 3072, 10240),
        fit=True,
    ),
    Figure(
        "2:4: CUTLASS example 62, H100 fp16 (assumed 4096 x 4096 x 4096)",
        "cutlass#2229",
        1.2,
        "x",
        product_gain("H100", "fp16", 4096, 4096, 4096),
        fit=True,
    ),
    first_token("GPT-J 6B", "A100", "fp16", 2048, 129),
    first_token("GPT-J 6B", "L40S", "fp8", 2048, 71),
    first_token("GPT-J 6B", "H100", "fp8", 2048, 29),
    first_token("GPT-J 6B", "A100", "fp16", 128, 12),
    first_token("GPT-J 6B", "L40S", "fp8", 128, 12),
    first_token("GPT-J 6B", "H100", "fp8", 128, 7),
    first_token("LLaMA-7B", "A100", "fp16", 128, 16),
    first_token("LLaMA-7B", "L40S", "fp8", 128, 14),
    first_token("LLaMA-7B", "H100", "fp8", 128, 7),
    tokens_a_second(
        "Llama-3-8B",
        "A100",
        "bf16",
        1,
        100,
        0,
        source="torchao README before ao#4728 (assumed past of 100)",
        published=95.64,
    ),
    tokens_a_second("LLaMA-7B", "A100", "fp16", 1, 2048, 128, source=LMDEPLOY, published=86.1),
    tokens_a_second("LLaMA-7B", "A100", "fp16", 16, 128, 128, source=LMDEPLOY, published=1272),
    tokens_a_second("LLaMA-7B", "A100", "fp16", 64, 128, 128, source=LMDEPLOY, published=3024),
    tokens_a_second("LLaMA-7B", "A100", "fp16", 64, 128, 2048, source=LMDEPLOY, published=1852),
    tokens_a_second("LLaMA-13B", "A100", "fp16", 16, 128, 128, source=LMDEPLOY, published=757),
    tokens_a_second("LLaMA-7B", "A100", "fp16", 64, 128, 128, source=TRT_LLM, published=3486),
    tokens_a_second("LLaMA-7B", "L40S", "fp8", 64, 128, 128, source=TRT_LLM, published=3240),
    tokens_a_second("LLaMA-7B", "H100", "fp8", 64, 128, 128, source=TRT_LLM, published=9193),
    tokens_a_second("LLaMA-7B", "H100", "fp8", 64, 2048, 128, source=TRT_LLM, published=2058),
    Figure(
        "LLaMA-7B (assumed A6000, one prompt of 2048)",
        "arXiv 2306.11695, recalled",
        312,
        "ms",
        milliseconds(time_of("LLaMA-7B", "A6000", "fp16", 1, 2048, 1)),
    ),
    Figure(
        "2:4: the same",
        "arXiv 2306.11695, recalled",
        1.24,
        "x",
        sparse_gain("LLaMA-7B", "A6000", "fp16", 1, 2048, 1),
    ),
    # 6.1 GB, the size that the post gives for the sparse checkpoint, is fp8 and 2:4.
    Figure(
        "2:4 in fp8 against bf16: Llama-3-8B, 1024 + 1024 tokens (assumed H100, batch 256)",
        "HPC-AI blog",
        1.27,
        "x",
        gain(
            time_of("Llama-3-8B", "H100", "bf16", 256, 1024, 1024),
            time_of("Llama-3-8B", "H100", "fp8", 256, 1024, 1024, sparse=True),
        ),
    ),
    Figure(
        "2:4: Llama-3.1-8B, latency (assumed H100 bf16, batch 1, 512 + 128)",
        "Neural Magic, Dec 2024",
        1.3,
        "x",
        sparse_gain("Llama-3-8B", "H100", "bf16", 1, 512, 128),
    ),
    *(
        Figure(
            f"2:4: LLaMA-7B, {gpu} fp16, batch 1, 128 + 128 tokens",
            "TensorRT-LLM#1802",
            1.0,
            "x",
            sparse_gain("LLaMA-7B", gpu, "fp16", 1, 128, 128),
        )
        for gpu in ("A10", "H100")
    ),
    Figure(
        "2:4: Qwen3-4B, L4 fp16 (assumed batch 1, 128 + 128)",
        "Model-Optimizer#1974",
        1.0,
        "x",
        sparse_gain("Qwen3-4B", "L4", "fp16", 1, 128, 128),
    ),
    *(
        Figure(
            f"2:4: {m} x 8192 x 8192, H100 fp8",
            "ao#2012 (two of them and an activation)",
            published,
            "x",
            product_gain("H100", "fp8", m, 8192, 8192),
        )
        for m, published in ((64, 103.008 / 74.304), (128, 99.936 / 75.456), (256, 114.08 / 82.432))
    ),
    Figure(
        "2:4: a product, H100 fp8 (assumed 4096 x 4096 x 4096)",
        "HPC-AI blog",
        1.22,
        "x",
        product_gain("H100", "fp8", 4096, 4096, 4096),
    ),
    Figure(
        "2:4: 2048 x 12288 x 12288 (assumed), A100 fp16; middle of 1.54 to 1.79",
        "arXiv 2301.00774, recalled",
        1.66,
        "x",
        product_gain("A100", "fp16", 2048, 12288, 12288),
    ),
    Figure(
        "smaller: Llama-3.1-8B to Minitron-4B-Width (assumed H100 fp8, batch 64, 1024 + 1024)",
        "arXiv 2408.11796, recalled",
        1.8,
        "x",
        gain(
            time_of("Llama-3-8B", "H100", "fp8", 64, 1024, 1024),
            time_of("Minitron-4B", "H100", "fp8", 64, 1024, 1024),
        ),
    ),
)


def solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Find the root of a function that is monotonic between `low` and `high`, by bisection."""
    rises = function(high) > function(low)
    for _ in range(50):
        middle = (low + high) / 2
        if (function(middle) > 0) == rises:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def fit() -> Efficiency:
    """Fit the constants to the figures marked "fit".

    Bandwidth and cost of a kernel meet both throughputs exactly. The 16-bit compute efficiency
    meets the A100's first-token latency exactly. The 8-bit compute efficiency is the geometric mean
    of the values that meet the L40S's and the H100's. The gain of sparse kernels is the geometric
    mean of the two published gains.
    """
    prefills, decodes, products = FIGURES[:3], FIGURES[3:5], FIGURES[5:7]

    def met(figure: Figure, at: Efficiency, name: str, low: float, high: float) -> float:
        def off(value: float) -> float:
            changed = dataclasses.replace(at, **{name: value})
            return figure.predict(changed).likely - figure.published

        return solve(off, low, high)

    found = FITTED
    for _ in range(30):  # fit the constants in turns, until none changes
        found = dataclasses.replace(found, bandwidth=met(decodes[1], found, "bandwidth", 0.1, 2.0))
        found = dataclasses.replace(
            found, kernel_seconds=met(decodes[0], found, "kernel_seconds", 0.0, 1e-4)
        )
        eights = [met(figure, found, "compute8", 0.05, 1.0) for figure in prefills[1:]]
        found = dataclasses.replace(
            found,
            compute16=met(prefills[0], found, "compute16", 0.05, 1.0),
            compute8=math.prod(eights) ** 0.5,
        )
    gains = [figure.published for figure in products]
    return dataclasses.replace(found, sparse_gain=math.prod(gains) ** 0.5)


def main() -> None:
    """Fit, and print every figure beside its forecast."""
    fitted = fit()
    table = Table(title="Published figures and forecasts")
    for name in ("figure", "source", "", "published", "forecast", "error", "at best"):
        table.add_column(name, justify="left" if name in ("figure", "source") else "right")
    errors: dict[str, list[float]] = {}
    inside: list[bool] = []
    for figure in FIGURES:
        prediction = figure.predict(FITTED)
        error = prediction.likely / figure.published - 1
        kind = "fit" if figure.fit else "ratios" if figure.unit == "x" else "times"
        errors.setdefault(kind, []).append(abs(error))
        if kind == "ratios" and prediction.best > prediction.likely:
            inside.append(0.95 * prediction.likely <= figure.published <= 1.05 * prediction.best)
        table.add_row(
            figure.what,
            figure.source,
            "fit" if figure.fit else "",
            f"{figure.published:.4g} {figure.unit}",
            f"{prediction.likely:.4g}",
            f"{error:+.0%}",
            f"{prediction.best:.4g}" if figure.unit == "x" else "",
        )
    console = Console()
    console.print(table)
    summary = {
        kind: {
            "figures": len(found),
            "mean": round(sum(found) / len(found), 3),
            "worst": round(max(found), 3),
        }
        for kind, found in errors.items()
    }
    for kind, found in summary.items():
        console.print(f"{kind}: {found}")
    console.print(
        f"2:4: {sum(inside)} of {len(inside)} published ratios lie between likely and at best "
        "(5 % either way)"
    )
    print(json.dumps({"fitted": dataclasses.asdict(fitted), "absolute_errors": summary}))


if __name__ == "__main__":
    main()
