"""What the tests of SmolLM2-135M-Instruct share: how it is pruned, and what its engine has to hold.

Both runs are real ones of the whole command. They have one cache, as two people at one machine
would, so the dense model is converted, measured and exported once.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.smollm2 import gguf_path
from tests.commands import COMMAND
from tests.store import Store


def prune_real(out: Path, store: Store, pattern: str) -> tuple[Path, dict[str, Any]]:
    """Make a bundle of the model; the dense model's own bundle, and the report."""
    cache = store.folder("real-cache", lambda folder: None)
    done = subprocess.run(
        [
            *(COMMAND, "prune-export", gguf_path(), "--pattern", pattern, "--target", "genai"),
            *("-o", out, "--nsamples", "8", "--seqlen", "256", "--eval-segments", "4"),
            *("--eval-seqlen", "512", "--rounds", "3", "--new-tokens", "8", "--json"),
        ],
        env={**os.environ, "THANOS_DEPLOY_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (dense,) = cache.iterdir()
    (report,) = json.loads(done.stdout)["models"]
    return dense, report


def require_engine(out: Path, *, sparse: bool) -> None:
    """Build an engine of a bundle; it has to hold every linear layer, and to pass `verify`."""
    subprocess.run(
        [COMMAND, "export", out, "--target", "tensorrt-rtx", "--sm", "86", "--max-seq", "2048"],
        check=True,
        capture_output=True,
    )
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
    verified = subprocess.run([COMMAND, "verify", out, "--json"], capture_output=True, check=True)
    checks = json.loads(verified.stdout)["checks"]
    assert not any(check["outcome"] == "FAIL" for check in checks)
