"""What the tests of SmolLM2-135M-Instruct share: how it is pruned, and what its engine has to hold.

Both runs are real ones of the whole command. They have one cache, as two people at one machine
would, so the dense model is converted, measured and exported once.
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
    """Make a bundle of the model; the dense model's own bundle, and the report."""
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
    """Standard output of a command that has to succeed, in a process of its own."""
    command = Command(
        *arguments, environment={"THANOS_DEPLOY_CACHE": str(cache)} if cache else None
    )
    output, errors = command.communicate()
    assert command.returncode == 0, errors.decode()
    return output.decode()


def require_greedy(folder: Path, prompt: list[int], ids: list[int]) -> None:
    """What was written after a prompt has to be what PyTorch writes, one greedy step at a time.

    PyTorch reads it all at once: each token has to be the likeliest one after those before it,
    which is what its own loop would have taken.
    """
    with torch.inference_mode():
        logits = stock_model(folder)(torch.tensor([prompt + ids])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == ids


def require_engine(out: Path, *, sparse: bool) -> None:
    """Build an engine of a bundle; it has to hold every linear layer, and to pass `verify`."""
    _run("export", out, "--target", "tensorrt-rtx", "--sm", "86", "--max-seq", "2048")
    folder = out / "engines" / "tensorrt-rtx-sm86"
    build = json.loads((folder / "build.json").read_text())
    assert build["dtype"] == "fp16"
    assert build["sparse_weights"] == sparse
    assert build["summary"]["pattern_holds"] == (210 if sparse else 0)
    hosts = {layer["name"]: layer["engine_layer"] for layer in build["layers"]}
    assert len(hosts) == 210
    assert all(hosts.values())
    # The listing of the log itself: products of each profile, with the sizes of this model.
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
