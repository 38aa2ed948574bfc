"""Measure peak memory of exporting a model that is larger than the 2 GB that protobuf allows.

`python -m benchmarks.large_export FOLDER` writes a random LLaMA of 582 million parameters to FOLDER
(which needs 4.7 GB), exports it in a process of its own, and prints sizes, time and memory.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from thanos_deploy.model.pretrained import make_model

_EXPORT = """
import sys
from pathlib import Path
import exporters.onnx.graph
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.machine.environment import peak_memory_bytes
model, out = map(Path, sys.argv[1:])
record = exporters.onnx.graph.export(Checkpoint.open(model), out, pattern=None)
print(max(case.logits_error for case in record.parity), peak_memory_bytes())
"""


def main(folder: Path) -> None:
    """Make the model, export it, and print the measurements."""
    model, out = folder / "model", folder / "onnx"
    out.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=11,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    make_model(config).save_pretrained(model)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, model, out], stdout=subprocess.PIPE, text=True, check=True
    )
    error, peak = done.stdout.split()
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    data = (out / "model.onnx.data").stat().st_size
    print(
        f"weights {weights / 1e9:.2f} GB; model.onnx.data {data / 1e9:.2f} GB; "
        f"{time.perf_counter() - started:.0f} s; logits differ by {float(error):.1e} of their "
        f"range; peak memory {int(peak) / 1e9:.2f} GB, {int(peak) / weights:.2f} times the weights"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
