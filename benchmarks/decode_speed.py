"""Compare the decode speed of one model in three runtimes, in turns, in one process.

`python -m benchmarks.decode_speed OUT`: OUT is a bundle with the targets onnx and genai. Each round
generates greedily with our runtime, with ORT-GenAI on the same graph, and with transformers on the
checkpoint. The time of the prompt is not counted. Prints the median time per token of each runtime,
and the ratios of the other runtimes to ours over the rounds.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import torch
from transformers.generation.streamers import BaseStreamer

from runtime.engine import open_engine
from runtime.generate import generate
from thanos_deploy.model.load import load_model

Tokens = list[int]


def ours(out: Path, new_tokens: int) -> Callable[[Tokens], tuple[Tokens, float]]:
    """Open our runtime, and return a function that generates with it.

    The function returns the new tokens, and the seconds from the first of them to the last.
    """
    engine = open_engine(out)

    def run(prompt: Tokens) -> tuple[Tokens, float]:
        stream = generate(engine, prompt, new_tokens=new_tokens)
        tokens = [next(stream)]
        started = time.perf_counter()
        tokens += stream
        return tokens, time.perf_counter() - started

    return run


def genai(out: Path, new_tokens: int) -> Callable[[Tokens], tuple[Tokens, float]]:
    """Return such a function for ORT-GenAI; see `ours`."""
    model = onnxruntime_genai.Model(str(out / "genai"))

    def run(prompt: Tokens) -> tuple[Tokens, float]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(
            max_length=len(prompt) + new_tokens, min_length=len(prompt) + new_tokens
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - started
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]], seconds

    return run


class _Clock(BaseStreamer):
    """Streamer that records when `generate` delivers the prompt and each token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        """Record the time of a delivery."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; the base class requires this method."""


def transformers(out: Path, new_tokens: int) -> Callable[[Tokens], tuple[Tokens, float]]:
    """Return such a function for transformers' own generate, in float32; see `ours`."""
    model: Any = load_model(out / "model")  # transformers' types say that it cannot generate

    def run(prompt: Tokens) -> tuple[Tokens, float]:
        clock = _Clock()
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            streamer=clock,
        )
        return ids[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[1]

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    subjects = {
        make.__name__: make(arguments.out, arguments.new_tokens)
        for make in (ours, genai, transformers)
    }
    prompt = list(range(1000, 1000 + arguments.prompt))
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    texts = {}
    for number in range(arguments.rounds + 1):  # the first one warms up
        for name, run in subjects.items():
            texts[name], taken = run(prompt)
            if number:
                seconds[name].append(taken / (arguments.new_tokens - 1))
    for name, taken_seconds in seconds.items():
        print(f"{name:>12}: {np.median(taken_seconds) * 1e3:6.1f} ms per token, median")
    for name in ("genai", "transformers"):
        ratios = np.array(seconds[name]) / np.array(seconds["ours"])
        print(
            f"ours is {np.median(ratios):.2f} times as fast as {name} "
            f"({ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} rounds)"
        )
    print(f"the same tokens: {len({tuple(text) for text in texts.values()}) == 1}")


if __name__ == "__main__":
    main()
