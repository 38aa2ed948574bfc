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
            for name in ("model", "onnx")
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

{layers["layers"]} linear layers with {layers["weights"]:,} weights, {layers["sparsity"]:.2%} of them zero. The
pattern {"holds in every layer" if layers["pattern_holds"] else f"does not hold in {len(layers['layers_off_pattern'])} layers"},
read back from the files. On the calibration text a layer misses {layers["median_relative_error"]:.2%} of the
energy of the output that it aims at in the median and {layers["worst_relative_error"]:.2%} at worst
({layers["worst_layer"]}).
`layers.json` has every layer. Embeddings, norms, biases and the output head are unchanged.

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```

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
