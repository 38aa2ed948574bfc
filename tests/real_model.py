"""Code that the tests of SmolLM2-135M-Instruct share: how to prune the model and check the results.

Both test modules run the whole command `prune-export`. The two runs share one cache, as runs on one
machine do, so the dense model is converted, measured and exported once.
"""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.smollm2 import gguf_path
from tests.commands import Command
from tests.conftest import stock_model
from tests.store import Store


def prune_real(out: Path, store: Store, pattern: str, *options: str) -> tuple[Path, dict[str, Any]]:
    """Prune and export the model.

    Args:
        out: folder of the new bundle.
        store: the store that has the cache.
        pattern: value of `--pattern`.
        options: further arguments of `prune-export`.

    Returns:
        The bundle of the dense model in the cache, and the entry of the report for the pruned
        model.
    """
    cache = store.folder("real-cache", lambda folder: None)
    printed = _run(
        *("prune-export", gguf_path(), "--pattern", pattern, "--target", "genai", "-o", out),
        *("--nsamples", "8", "--seqlen", "128", *options, "--eval-segments", "4"),
        *("--eval-seqlen", "256", "--eval-questions", "16"),
        *("--rounds", "2", "--prompt", "32", "--new-tokens", "8", "--json"),
        cache=cache,
    )
    (dense,) = cache.iterdir()
    (report,) = json.loads(printed)["models"]
    return dense, report


def _run(*arguments: object, cache: Path | None = None) -> str:
    """Run a command that must succeed, in its own process; return its standard output."""
    command = Command(
        *arguments, environment={"THANOS_DEPLOY_CACHE": str(cache)} if cache else None
    )
    output, errors = command.communicate()
    assert command.returncode == 0, errors.decode()
    return output.decode()


def require_greedy(folder: Path, prompt: list[int], ids: list[int]) -> None:
    """Require that generated tokens are those that PyTorch generates greedily.

    PyTorch reads the prompt and all tokens in one pass. Each token must be the likeliest one after
    the tokens before it, which is the token that a greedy loop would have chosen.

    Args:
        folder: folder of the model.
        prompt: token IDs of the prompt.
        ids: the generated token IDs.
    """
    with torch.inference_mode():
        logits = stock_model(folder)(torch.tensor([prompt + ids])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == ids


def require_engine(out: Path, *, sparse: bool) -> None:
    """Build a TensorRT-RTX engine of a bundle, and require every linear layer and a clean `verify`.

    Args:
        out: the bundle.
        sparse: whether the model is 2:4, so that the engine must be built with sparse weights.
    """
    _run("export", out, "--target", "tensorrt-rtx", "--sm", "86", "--max-seq", "2048")
    folder = out / "engines" / "tensorrt-rtx-sm86"
    build = json.loads((folder / "build.json").read_text())
    assert build["dtype"] == "fp16"
    assert build["sparse_weights"] == sparse
    assert build["summary"]["pattern_holds"] == (210 if sparse else 0)
    hosts = {layer["name"]: layer["engine_layer"] for layer in build["layers"]}
    assert len(hosts) == 210
    assert all(hosts.values())
    # The layers as the build log lists them: a product for each profile, with this model's sizes.
    config = json.loads((out / "model" / "config.json").read_text())
    channels, hidden = config["intermediate_size"], config["hidden_size"]
    listed = [
        line
        for line in (folder / "build.log").read_text().splitlines()
        if "model.layers.0.mlp.down_proj" in line and "LayerType: " in line
    ]
    assert any(f"Dimensions: [{channels},{hidden}]" in line for line in listed)
    assert all("Half" in line for line in listed)
    checks = json.loads(_run("verify", out, "--json"))["checks"]
    assert not any(check["outcome"] == "FAIL" for check in checks)
