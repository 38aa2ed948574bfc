"""Show at which step ORT-GenAI's own batching engine admits new requests to a batch.

`python -m benchmarks.genai_engine OUT`: OUT is a bundle with the target genai. Sends six requests
for texts of different lengths, the last one after three runs of the engine, and prints in which
runs each request got its tokens. Then loads the same folder with an `engine` section in its
configuration that asks for dynamic batching.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

LENGTHS = [8, 24, 12, 16, 8]
LATE = 8


def static(folder: Path) -> None:
    """Run the requests with the folder of `export --target genai` as it is."""
    engine = genai.Engine(genai.Model(str(folder)))
    capabilities = engine.get_capabilities()
    print(f"configured batch: {capabilities.configured_max_batch_size}")
    runs: list[list[int]] = []
    requests = []

    def send(new_tokens: int) -> None:
        request = engine.create_request()
        options = genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_min_generated_tokens(new_tokens)
        options.set_max_generated_tokens(new_tokens)
        request.begin_turn(np.arange(1000, 1032, dtype=np.int32), options)
        requests.append(request)
        runs.append([])

    for length in LENGTHS:
        send(length)
    buffer = engine.create_event_buffer(64)
    number = 0
    while engine.has_pending_requests():
        number += 1
        engine.run(buffer)
        for event in buffer:
            if event.flags.value & genai.EngineEventFlags.TOKEN.value:
                runs[requests.index(event.request)].append(number)
        if number == 3:
            send(LATE)
    for which, seen in enumerate(runs):
        print(f"request {which}: {len(seen)} tokens, in the runs {seen[0]} to {seen[-1]}")


def dynamic(folder: Path) -> None:
    """Load a copy of the folder whose configuration asks for dynamic batching."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        copy = Path(place) / "genai"
        shutil.copytree(folder, copy)
        path = copy / "genai_config.json"
        config = json.loads(path.read_text())
        config["engine"] = {"dynamic_batching": {"num_blocks": 64, "max_batch_size": 8}}
        path.write_text(json.dumps(config))
        try:
            genai.Engine(genai.Model(str(copy)))
            print("dynamic batching: loaded")
        except Exception as error:
            print(f"dynamic batching: {error}")


def main() -> None:
    """Run both engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out / "genai"
    static(folder)
    dynamic(folder)


if __name__ == "__main__":
    main()
