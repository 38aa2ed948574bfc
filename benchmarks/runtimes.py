"""Time prefill and decode of one model in several runtimes, in turns, in one process.

`python -m benchmarks.runtimes SUBJECT...` where a subject is a bundle with the target onnx (ours),
a GGUF file (llama.cpp, by the package cyllama), a folder of ORT-GenAI, or `openvino:MODEL.onnx`
with a graph of the target onnx. Every subject gets the same token IDs and continues them greedily.
Prints the medians, and the median over the rounds of the ratio to the first subject; `--json FILE`
keeps all times.

The machine has to be idle for the times to mean anything. Threads of ONNX Runtime spin for a while
after a run, so there is a pause before each turn.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.llama_cpp import batch_of, model_of
from runtime.engine import open_engine
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment
from thanos_deploy.measure.evaluation import graph_reader
from thanos_deploy.measure.perplexity import POSITIONS_AT_ONCE, Read

PAUSE = 0.3

# Appends tokens to the sequence, and returns the logits after the last one.
Step = Callable[[Sequence[int]], Any]
# Starts a new sequence with an empty KV cache.
Begin = Callable[[], Step]


@dataclass(frozen=True, slots=True)
class Turn:
    """One generated text of one subject.

    Attributes:
        prefill: seconds from the prompt to the first token.
        decode: mean seconds of each further token.
        tokens: the generated tokens.
    """

    prefill: float
    decode: float
    tokens: tuple[int, ...]


def ours(bundle: Path, threads: int, most: int) -> Begin:
    """Open this project's runtime."""
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
    """Open llama.cpp, with its own defaults for KV cache and attention."""
    module, model = _llama(path)

    def begin() -> Step:
        context = _llama_context(module, model, threads, most)
        past = 0

        def step(ids: Sequence[int]) -> Any:
            nonlocal past
            context.decode(batch_of(module, ids, past))
            past += len(ids)
            return np.asarray(context.get_logits(), dtype=np.float32)

        return step

    return begin


def llama_cpp_reader(path: Path, threads: int) -> Read:
    """Open llama.cpp to compute the logits after every token of a segment."""
    module, model = _llama(path)

    def read(ids: Tensor) -> Iterator[Tensor]:
        context = _llama_context(module, model, threads, len(ids))
        context.decode(batch_of(module, ids.tolist(), 0, every=True))
        for part in torch.arange(len(ids)).split(POSITIONS_AT_ONCE):
            rows = [np.array(context.get_logits_ith(one), np.float32) for one in part.tolist()]
            yield torch.from_numpy(np.stack(rows))

    return read


def _llama(path: Path) -> tuple[Any, Any]:
    module: Any = importlib.import_module("cyllama.llama.llama_cpp")
    module.set_log_callback(lambda level, text: None)
    return module, model_of(module, path)


def _llama_context(module: Any, model: Any, threads: int, most: int) -> Any:
    settings = module.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = most
    settings.n_threads = settings.n_threads_batch = threads
    return module.LlamaContext(model, settings)


def genai(folder: Path, threads: int, most: int) -> Begin:
    """Open ORT-GenAI, with a graph of ours or of its own builder."""
    module, model = _genai(folder, threads)

    def begin() -> Step:
        generator = _generator(module, model, most)

        def step(ids: Sequence[int]) -> Any:
            generator.append_tokens(np.array([ids], dtype=np.int32))
            return np.asarray(generator.get_logits())[0, -1]

        return step

    return begin


def genai_reader(folder: Path, threads: int) -> Read:
    """Open ORT-GenAI to compute the logits after every token of a segment."""
    module, model = _genai(folder, threads)

    def read(ids: Tensor) -> Sequence[Tensor]:
        generator = _generator(module, model, len(ids) + 1)
        generator.append_tokens(ids[None].numpy().astype(np.int32))
        logits = np.asarray(generator.get_output("logits"), np.float32)[0]
        return torch.split(torch.from_numpy(logits), POSITIONS_AT_ONCE)

    return read


def _genai(folder: Path, threads: int) -> tuple[Any, Any]:
    module: Any = importlib.import_module("onnxruntime_genai")
    config = module.Config(str(folder))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    return module, module.Model(config)


def _generator(module: Any, model: Any, most: int) -> Any:
    parameters = module.GeneratorParams(model)
    parameters.set_search_options(max_length=most)
    return module.Generator(model, parameters)


def openvino(path: Path, threads: int, most: int) -> Begin:
    """Open OpenVINO; the KV cache is an explicit input and output of every step."""
    request = _openvino(path, threads)

    def begin() -> Step:
        past, cache = 0, _empty_cache(request)

        def step(ids: Sequence[int]) -> Any:
            nonlocal past, cache
            logits, cache = _infer(request, ids, past, cache)
            past += len(ids)
            return logits[-1]

        return step

    return begin


def openvino_reader(path: Path, threads: int) -> Read:
    """Open OpenVINO to compute the logits after every token; the graph has to give all of them."""
    request = _openvino(path, threads)

    def read(ids: Tensor) -> Sequence[Tensor]:
        logits, _ = _infer(request, ids.tolist(), 0, _empty_cache(request))
        return torch.split(torch.from_numpy(logits.copy()), POSITIONS_AT_ONCE)

    return read


def _openvino(path: Path, threads: int) -> Any:
    module: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return module.Core().compile_model(path, "CPU", settings).create_infer_request()


def _cache_ports(request: Any) -> list[Any]:
    return [port for port in request.model_inputs if port.any_name.startswith("past_")]


def _empty_cache(request: Any) -> list[Any]:
    shapes = [port.partial_shape for port in _cache_ports(request)]
    return [
        np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
        for shape in shapes
    ]


def _infer(request: Any, ids: Sequence[int], past: int, cache: list[Any]) -> tuple[Any, list[Any]]:
    """Return the logits, [tokens, vocabulary] or [1, vocabulary], and the extended cache."""
    total = past + len(ids)
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total)[None],
        **{port.any_name: one for port, one in zip(_cache_ports(request), cache, strict=True)},
    }
    results = list(request.infer(feeds).values())
    return results[0][0], [one.copy() for one in results[1:]]


def opened(subject: str, threads: int, most: int) -> Begin:
    """Open the runtime that a subject is for, for sequences of at most `most` tokens."""
    kind, path = _kind(subject)
    return {"openvino": openvino, "llama.cpp": llama_cpp, "genai": genai, "ours": ours}[kind](
        path, threads, most
    )


def reader(subject: str, threads: int) -> Read:
    """Open the runtime of a subject to compute the logits after every token.

    A graph has to give all logits. `threads` has no effect on our own runtime.
    """
    kind, path = _kind(subject)
    if kind == "ours":
        return graph_reader(path)
    return {"openvino": openvino_reader, "llama.cpp": llama_cpp_reader, "genai": genai_reader}[
        kind
    ](path, threads)


def _kind(subject: str) -> tuple[str, Path]:
    """Return the runtime of a subject, and its path."""
    kind, _, rest = subject.partition(":")
    if kind == "openvino":
        return kind, Path(rest)
    path = Path(subject)
    if path.suffix == ".gguf":
        return "llama.cpp", path
    return "genai" if (path / "genai_config.json").exists() else "ours", path


def turn(begin: Begin, prompt: Sequence[int], new_tokens: int, *, pause: float = PAUSE) -> Turn:
    """Generate one text, and time it."""
    time.sleep(pause)
    step = begin()
    started = time.perf_counter()
    tokens = [int(np.argmax(step(prompt)))]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        tokens.append(int(np.argmax(step(tokens[-1:]))))
    ended = time.perf_counter()
    return Turn(first - started, (ended - first) / (new_tokens - 1), tuple(tokens))


def rounds(
    subjects: Mapping[str, Begin],
    prompt: Sequence[int],
    new_tokens: int,
    count: int,
    *,
    pause: float = PAUSE,
) -> Iterator[dict[str, Turn]]:
    """Yield rounds in which every subject has a turn; the order is reversed in every other round.

    A first round warms up and is not among them.
    """
    for number in range(count + 1):
        order = list(subjects) if number % 2 else reversed(list(subjects))
        taken = {name: turn(subjects[name], prompt, new_tokens, pause=pause) for name in order}
        if number:
            yield taken


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
    taken = list(rounds(subjects, prompt, arguments.new_tokens, arguments.rounds))
    turns = {name: [one[name] for one in taken] for name in subjects}
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
