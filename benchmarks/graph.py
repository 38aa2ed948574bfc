"""Count the nodes of exported graphs, and measure their time on one thread.

Usage: python -m benchmarks.graph [--rounds N] [--prompt N] NAME=FOLDER...

FOLDER holds model.onnx. Prints for each graph the number of nodes in the file, the number that ONNX
Runtime runs after its own fusions, and the minimum processor time of a prefill of --prompt tokens
(128) and of a decode step after as many tokens. The models take turns. The minimum processor time
of one thread is the figure that a busy machine disturbs least. It is not a latency; for latencies
see `benchmarks.shrinking`.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment

# Number of passes per round; more for decode, whose passes are short.
REPEATS = {"prefill": 1, "decode": 8}


def main() -> None:
    """Count and time the graphs, and print the results; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graphs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=128)
    arguments = parser.parse_args()
    paths = {
        name: Path(folder) / "model.onnx"
        for name, _, folder in (graph.partition("=") for graph in arguments.graphs)
    }
    nodes = {name: [count(path), count_running(path)] for name, path in paths.items()}
    sessions = {name: open_session(path) for name, path in paths.items()}
    least = {name: dict.fromkeys(REPEATS, float("inf")) for name in paths}
    for _ in range(arguments.rounds):
        for name, session in sessions.items():
            for kind, repeats in REPEATS.items():
                seconds = processor_time(session, kind, repeats, arguments.prompt)
                least[name][kind] = min(least[name][kind], seconds)
    for name in paths:
        written, running = nodes[name]
        print(
            f"{name:24s} {written:5d} nodes, {running:5d} running, "
            + ", ".join(f"{kind} {least[name][kind] * 1e3:.2f} ms" for kind in REPEATS)
        )
    print(
        json.dumps(
            {"nodes": nodes, "seconds": least, "environment": encode(environment.describe())}
        )
    )


def count(path: Path) -> int:
    """Return the number of nodes in a file, without constants."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = Counter(str(node.op_type) for node in graph.node)
    return kinds.total() - kinds["Constant"]


def count_running(path: Path) -> int:
    """Return the number of nodes that ONNX Runtime runs after its fusions."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.data"
        )
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return count(Path(folder) / "optimised.onnx")


def open_session(path: Path) -> ort.InferenceSession:
    """Open a session on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def processor_time(session: ort.InferenceSession, kind: str, repeats: int, prompt: int) -> float:
    """Return the mean processor seconds of a pass, after a warm-up pass."""
    sequence, past = (prompt, 0) if kind == "prefill" else (1, prompt)
    generator = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {
        "input_ids": np.ones((1, sequence), np.int64),
        "attention_mask": np.ones((1, past + sequence), np.int64),
        "position_ids": np.arange(past, past + sequence)[None],
    }
    for entry in session.get_inputs()[3:]:
        shape = (1, entry.shape[1], past, entry.shape[3])
        feeds[entry.name] = generator.standard_normal(shape, np.float32)
    session.run(None, feeds)
    started = time.process_time()
    for _ in range(repeats):
        session.run(None, feeds)
    return (time.process_time() - started) / repeats


if __name__ == "__main__":
    main()
