"""Prefill and decode of one model in several runtimes, in turns, in one process.

`python -m benchmarks.runtimes SUBJECT...` where a subject is a bundle with the target onnx (ours),
a GGUF file (llama.cpp, by the package cyllama), a folder of ORT-GenAI, or `openvino:MODEL.onnx`
with a graph of the target onnx. Every subject gets the same ids and continues them greedily. Prints
the medians, and the ratio of each to the first subject, round by round; `--json FILE` keeps them.

The machine has to be idle for the times to mean anything. Threads of ONNX Runtime spin for a while
after a run, so there is a pause before each turn.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.llama_cpp import batch_of, model_of
from runtime.engine import open_engine
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment

_PAUSE = 0.3

# Reads tokens that follow those before, and returns the logits after the last one.
Step = Callable[[Sequence[int]], Any]
# Forgets everything.
Begin = Callable[[], Step]


@dataclass(frozen=True, slots=True)
class Turn:
    """One text of one subject: seconds of the prompt and of a token, and the tokens."""

    prefill: float
    decode: float
    tokens: tuple[int, ...]


def ours(bundle: Path, threads: int, most: int) -> Begin:
    """This project's runtime."""
    engine = open_engine(bundle, threads=threads)

    def begin() -> Step:
        begun = False

        def step(ids: Sequence[int]) -> Any:
            nonlocal begun
            if begun:
                return engine.decode(np.array(ids))[0]
            begun = True
            return engine.prefill(np.array([ids]))[0]

        return step

    return begin


def llama_cpp(path: Path, threads: int, most: int) -> Begin:
    """llama.cpp with its own defaults for cache and attention."""
    module: Any = importlib.import_module("cyllama.llama.llama_cpp")
    module.set_log_callback(lambda level, text: None)
    model = model_of(module, path)
    context_settings = module.LlamaContextParams()
    context_settings.n_ctx = context_settings.n_batch = context_settings.n_ubatch = most
    context_settings.n_threads = context_settings.n_threads_batch = threads

    def begin() -> Step:
        context = module.LlamaContext(model, context_settings)
        past = 0

        def step(ids: Sequence[int]) -> Any:
            nonlocal past
            context.decode(batch_of(module, ids, past))
            past += len(ids)
            return np.asarray(context.get_logits(), dtype=np.float32)

        return step

    return begin


def genai(folder: Path, threads: int, most: int) -> Begin:
    """ORT-GenAI, on a graph of ours or of its own builder."""
    module: Any = importlib.import_module("onnxruntime_genai")
    config = module.Config(str(folder))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    model = module.Model(config)

    def begin() -> Step:
        parameters = module.GeneratorParams(model)
        parameters.set_search_options(max_length=most)
        generator = module.Generator(model, parameters)

        def step(ids: Sequence[int]) -> Any:
            generator.append_tokens(np.array([ids], dtype=np.int32))
            return np.asarray(generator.get_logits())[0, -1]

        return step

    return begin


def openvino(path: Path, threads: int, most: int) -> Begin:
    """OpenVINO, which is handed the cache and gives the longer one."""
    module: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = module.Core().compile_model(path, "CPU", settings).create_infer_request()
    cached = [port for port in request.model_inputs if port.any_name.startswith("past_")]

    def begin() -> Step:
        cache = [
            np.zeros(
                (1, port.partial_shape[1].get_length(), 0, port.partial_shape[3].get_length())
            ).astype(np.float32)
            for port in cached
        ]
        past = 0

        def step(ids: Sequence[int]) -> Any:
            nonlocal past, cache
            total = past + len(ids)
            feeds = {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(past, total)[None],
                **{port.any_name: one for port, one in zip(cached, cache, strict=True)},
            }
            results = list(request.infer(feeds).values())
            past, cache = total, [one.copy() for one in results[1:]]
            return results[0][0, -1]

        return step

    return begin


def opened(subject: str, threads: int, most: int) -> Begin:
    """The runtime that a subject is for."""
    kind, _, rest = subject.partition(":")
    path = Path(rest if kind == "openvino" else subject)
    if kind == "openvino":
        return openvino(path, threads, most)
    if path.suffix == ".gguf":
        return llama_cpp(path, threads, most)
    return (genai if (path / "genai_config.json").exists() else ours)(path, threads, most)


def turn(begin: Begin, prompt: Sequence[int], new_tokens: int) -> Turn:
    """One text."""
    time.sleep(_PAUSE)
    step = begin()
    started = time.perf_counter()
    tokens = [int(np.argmax(step(prompt)))]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        tokens.append(int(np.argmax(step(tokens[-1:]))))
    ended = time.perf_counter()
    return Turn(first - started, (ended - first) / (new_tokens - 1), tuple(tokens))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="+")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    most = arguments.prompt + arguments.new_tokens
    subjects = {one: opened(one, arguments.threads, most) for one in arguments.subjects}
    prompt = list(range(1000, 1000 + arguments.prompt))
    turns: dict[str, list[Turn]] = {name: [] for name in subjects}
    for number in range(arguments.rounds + 1):  # the first one warms up
        for name in list(subjects) if number % 2 else reversed(subjects):
            taken = turn(subjects[name], prompt, arguments.new_tokens)
            if number:
                turns[name].append(taken)
    first = turns[arguments.subjects[0]]
    print("| | prefill, ms | times the first | token, ms | times the first | same tokens |")
    print("|---|---|---|---|---|---|")
    for name, its in turns.items():
        cells = [name]
        for part in ("prefill", "decode"):
            seconds, others = (
                np.array([getattr(one, part) for one in own]) for own in (its, first)
            )
            cells += [f"{np.median(seconds) * 1e3:.1f}", f"{np.median(seconds / others):.2f}"]
        alike = np.mean(np.array(its[-1].tokens) == np.array(first[-1].tokens))
        print(f"| {' | '.join(cells)} | {alike:.0%} |")
    if arguments.json:
        result = {
            "turns": {name: [asdict(one) for one in its] for name, its in turns.items()},
            "prompt": arguments.prompt,
            "threads": arguments.threads,
            "environment": encode(environment.describe()),
        }
        files.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
