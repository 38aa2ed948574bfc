"""llama.cpp through the package cyllama: run a GGUF file, and store it in fewer bits.

A failed assertion in llama.cpp ends the process, so every task runs in a subprocess. This module is
also the program of the subprocess: it reads a `_Task` as JSON from standard input, does it, and
writes the `_Answer` as JSON to standard output.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from exporters.packages import load
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.errors import GateError, PlatformError

PACKAGE = "cyllama"
_MODULE = "cyllama.llama.llama_cpp"

# `enum llama_ftype` of include/llama.h: the type of most matrices of a file.
FILE_TYPES = {"fp32": 0, "fp16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q4_k_m": 15, "bf16": 32}

# `GGML_TYPE_F32`, `LLAMA_FLASH_ATTN_TYPE_DISABLED` and `GGML_LOG_LEVEL_ERROR` in the headers of
# llama.cpp.
_F32 = 0
_NO_FLASH_ATTENTION = 0
_ERROR = 4


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Result of loading and running a GGUF file with llama.cpp.

    Attributes:
        tokens: ids of the text, including special tokens that the tokenizer adds at its ends.
        stops: those of the given ids at which generation stops.
        chat_template: the Jinja text that renders a conversation; empty for none.
        logits: float32[steps, vocabulary], after the prompt and after each token that follows it.
    """

    tokens: tuple[int, ...]
    stops: frozenset[int]
    chat_template: str
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Read:
    """The task to load and run a file; for the other attributes see `read`.

    Attributes:
        logits: file to write the logits to, with `numpy.save`.
    """

    verb: ClassVar[str] = "read"

    path: Path
    text: str
    ids: tuple[int, ...]
    prompt: int
    ends: tuple[int, ...]
    logits: Path


@dataclass(frozen=True, slots=True)
class _Store:
    """The task to write a file again in another type; see `store`.

    Attributes:
        type: a value of `FILE_TYPES`.
    """

    verb: ClassVar[str] = "store"

    path: Path
    destination: Path
    type: int


@dataclass(frozen=True, slots=True)
class _Task:
    """The message to the subprocess; the fields tell the two kinds of task apart."""

    task: _Read | _Store


@dataclass(frozen=True, slots=True)
class _Found:
    """A `Reading` without the logits, which go through a file."""

    tokens: tuple[int, ...]
    stops: tuple[int, ...]
    chat_template: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer of the subprocess; None for the task `_Store`."""

    found: _Found | None


def require() -> None:
    """Refuse a machine without llama.cpp.

    Raises:
        PlatformError: the package is not installed, or not for this system.
    """
    try:
        load(PACKAGE)
    except (ImportError, OSError) as error:
        raise PlatformError(
            f"the target gguf needs the package {PACKAGE} ({error})",
            fix="pip install 'thanos-deploy[gguf]'",
        ) from error


def read(path: Path, *, text: str, ids: Sequence[int], prompt: int, ends: Sequence[int]) -> Reading:
    """Load a GGUF file, tokenize a text with it, and compute logits.

    The KV cache is in float32; the dtype of the matrix products follows from the weights.

    Args:
        path: the file.
        text: the text to tokenize.
        ids: tokens to compute logits for.
        prompt: how many of them are passed at once; the others follow one by one.
        ends: ids that end a text.

    Raises:
        GateError: llama.cpp does not load or run the file; the message has llama.cpp's own words.
    """
    with TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits.npy"
        found = _run(path, _Read(path, text, tuple(ids), prompt, tuple(ends), logits)).found
        assert found is not None
        return Reading(
            tokens=found.tokens,
            stops=frozenset(found.stops),
            chat_template=found.chat_template,
            logits=np.load(logits),
        )


def store(source: Path, destination: Path, dtype: str) -> None:
    """Write a GGUF file again with its matrices in another type, as `llama-quantize` does.

    A matrix whose rows do not divide into the blocks of the type gets the nearest type that fits.

    Args:
        source: a file with all matrices in float32.
        destination: the file to write.
        dtype: one of `FILE_TYPES`.

    Raises:
        GateError: llama.cpp does not write the file; the message has llama.cpp's own words.
    """
    _run(destination, _Store(source, destination, FILE_TYPES[dtype]))


def _run(path: Path, task: _Read | _Store) -> _Answer:
    """Run a task in a subprocess.

    Raises:
        GateError: the subprocess ended with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "exporters.llama_cpp"],
        input=json.dumps(encode(_Task(task))),
        # Otherwise a failed assertion attaches a debugger.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-3:]
        raise GateError(
            f"{path}: llama.cpp fails to {task.verb} it: {' / '.join(said) or done.returncode}",
            fix=f"report the model and the version of {PACKAGE}",
        )
    return decode(_Answer, json.loads(done.stdout))


def model_of(module: Any, path: Path) -> Any:
    """Load a model on the CPU, in a form whose logits can be read.

    Args:
        module: cyllama's `llama.llama_cpp`.
        path: the GGUF file.
    """

    class Model(module.LlamaModel):  # type: ignore[misc]  # without types
        """Adds the attribute `n_vocab`: cyllama's contexts read it, but its models lack it."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    settings = module.LlamaModelParams()
    settings.n_gpu_layers = 0
    return Model(str(path), settings)


def batch_of(module: Any, ids: Sequence[int], past: int, *, every: bool = False) -> Any:
    """Make a batch of the next tokens of one text.

    Args:
        module: cyllama's `llama.llama_cpp`.
        ids: the tokens.
        past: number of tokens of the text that were passed before.
        every: compute logits after every token, not only after the last.
    """
    batch = module.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, past + place, [0], every or place == len(ids) - 1)
    return batch


def _read(module: Any, task: _Read) -> _Found:
    model = model_of(module, task.path)
    np.save(task.logits, _logits(module, model, task.ids, task.prompt))
    vocabulary = model.get_vocab()
    return _Found(
        tokens=tuple(int(token) for token in vocabulary.tokenize(task.text, True, True)),
        stops=tuple(token for token in task.ends if vocabulary.is_eog(token)),
        chat_template=model.get_default_chat_template() or "",
    )


def _logits(module: Any, model: Any, ids: Sequence[int], prompt: int) -> NDArray[np.float32]:
    settings = module.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
    # The KV cache is float16 by default, which would be the largest error.
    settings.type_k = settings.type_v = _F32
    settings.flash_attn_type = _NO_FLASH_ATTENTION
    context = module.LlamaContext(model, settings)
    rows = []
    for start, stop in pairwise([0, *range(prompt, len(ids) + 1)]):
        context.decode(batch_of(module, ids[start:stop], start))
        rows.append(np.asarray(context.get_logits(), dtype=np.float32))
    return np.stack(rows)


def _store(module: Any, task: _Store) -> None:
    settings = module.LlamaModelQuantizeParams()
    settings.ftype = task.type
    settings.nthread = len(os.sched_getaffinity(0))
    module.model_quantize(str(task.path), str(task.destination), settings)


def _main() -> int:
    """Run the task on standard input and return the exit code; errors go to standard error."""
    module: Any = load(_MODULE)

    def listen(level: int, text: str) -> None:
        if level == _ERROR and text.strip():
            print(text.strip(), file=sys.stderr)

    module.set_log_callback(listen)
    task, found = decode(_Task, json.load(sys.stdin)).task, None
    try:
        if isinstance(task, _Read):
            found = _read(module, task)
        else:
            _store(module, task)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(encode(_Answer(found))))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
