"""The model card: what the pruned model is, how good, how large, and how to load it."""

from thanos_deploy.artifact import Json


def write(report: Json) -> str:
    """README.md of a bundle, from its report."""
    quality, layers, size = report["quality"], report["linear_layers"], report["bytes"]
    latency, memory, sample = report["latency"], report["peak_memory_bytes"], report["sample"]
    rows = [
        ("perplexity", f"{quality['dense']:.2f}", f"{quality['pruned']:.2f}"),
        *(
            (
                f"{name} weights, MB",
                *(f"{size[name][who] / 1e6:.1f}" for who in ("dense", "pruned")),
            )
            for name in ("model", "packed", "onnx")
            if name in size
        ),
        *(
            (
                f"{what}, median ms",
                *(f"{latency[who][what]['median'] * 1e3:.1f}" for who in ("dense", "pruned")),
            )
            for what in ("prefill", "decode")
        ),
        ("peak memory, MB", *(f"{memory[who] / 1e6:.0f}" for who in ("dense", "pruned"))),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    verdict = "\n".join(f"- {sentence}" for sentence in report["verdict"])
    source = report["source"]
    environment = report["environment"]
    return f"""# {source["name"]}, pruned to {report["pattern"]} with {report["method"]}

Made by thanos-deploy {environment["thanos-deploy"]} from {source["name"]} (SHA-256 `{source["sha256"]}`
over its weights, configuration and tokenizer). The base model's licence and its limits apply.

| | dense | pruned |
|---|---|---|
{table}

Perplexity: {quality["segments"]} segments of {quality["length"]} tokens of {quality["text"]}. Latency and
memory: {latency["backend"]}, batch {latency["batch"]}, prompt {latency["prompt"]}, {environment["cores"]}
cores of {environment["processor"]}. GPU: {latency["gpu"]}.

{verdict}

## What was pruned

{_what(report)} On the calibration text a layer misses {layers["median_relative_error"]:.2%} of the
energy of the output that it aims at in the median and {layers["worst_relative_error"]:.2%} at worst
({layers["worst_layer"]}).

## How to load it

{_loading(report)}

`onnx/model.onnx` is one graph for prefill and decode with the kv cache as inputs and outputs;
its results differ from PyTorch's by at most {report["parity"]["worst"]:.1e} of their range
({report["parity"]["cases"]} cases, limit {report["parity"]["limit"]:g}).

## Limits

Pruned in one shot, without any training afterwards; judge it on your own task before you use it.
From the prompt "{sample["prompt"]}" it continues (greedily, the exported model):

> {sample["pruned"].strip().replace(chr(10), chr(10) + "> ")}

where the dense model continues:

> {sample["dense"].strip().replace(chr(10), chr(10) + "> ")}
"""


def _what(report: Json) -> str:
    layers, widths = report["linear_layers"], report["widths"]
    if widths is None:
        holds = (
            "holds in every layer"
            if layers["pattern_holds"]
            else f"does not hold in {len(layers['layers_off_pattern'])} layers"
        )
        return f"""{layers["layers"]} linear layers with {layers["weights"]:,} weights, {layers["sparsity"]:.2%} of them zero. The
pattern {holds}, read back from the files. `layers.json` has every
layer. Embeddings, norms, biases and the output head are unchanged."""
    rows = "\n".join(
        f"| {title} | {_range(widths[part]['before'])} | {_range(widths[part]['after'])} |"
        for part, title in (
            ("heads", "attention heads"),
            ("kv_heads", "key-value heads"),
            ("channels", "feed-forward channels"),
        )
    )
    return f"""{widths["removed"]:.2%} of the blocks' parameters are gone ({widths["block_parameters_before"]:,} before,
{widths["block_parameters_after"]:,} after); the layers that read what is left were refitted by least squares.

| in each block | dense | pruned |
|---|---|---|
{rows}

`layers.json` says which heads and channels stayed. Embeddings, norms and the output head are unchanged."""


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _loading(report: Json) -> str:
    widths = report["widths"]
    if widths is not None and not widths["stock_config"]:
        return """No stock `config.json` can describe these widths, so `AutoModelForCausalLM` refuses the folder:
`config.json` is the dense model's and `model/widths.json` declares the widths. Use the ONNX graph, or

```python
from pathlib import Path
from thanos_deploy.checkpoint import load_model

model = load_model(Path("model"))
```"""
    stock = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```"""
    if widths is None:
        return stock
    return f"""{stock}

`model/` is an ordinary checkpoint of its architecture with a smaller `config.json`: no code comes with
it and no flag is needed. Its numbers of heads and channels are those that the architecture's own
configuration states (`num_attention_heads`, `num_key_value_heads`, an explicit `head_dim`,
`intermediate_size` or what the family calls it), the same in every block. Loaders that read these
entries, such as vLLM and llama.cpp's converter, have what they need; that is an argument from the
configuration, they were not run here."""
