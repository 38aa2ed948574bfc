"""The commands under test, on a small model with random weights."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests import traced
from tests.commands import Command
from tests.conftest import write_model

BLOCKS = 4
_TEXT = ("--nsamples", "8", "--seqlen", "64")
_TUNE = ("--tune-steps", "8", "--tune-nsamples", "12")
_EVAL = ("--eval-segments", "2", "--eval-seqlen", "64")
_BENCH = ("--prompt", "8", "--past", "8", "--new-tokens", "2", "--rounds", "2")
_PRUNE = ("prune", "{model}", "--pattern", "2:4", "--method", "magnitude", *_TEXT)


@dataclass(frozen=True, slots=True)
class Work:
    """One command, and the commands that have to run before it.

    Attributes:
        name: name of the command.
        arguments: arguments of `thanos-deploy`, with {model} for the model and {out} for the
            bundle.
        before: arguments of the commands that have to run before, in the same form.
        first: function that the process calls first.
    """

    name: str
    arguments: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    first: Callable[[], object] | None = None

    def prepare(self, model: Path, out: Path) -> None:
        """Run the commands that have to run before."""
        for arguments in self.before:
            run(arguments, model, out)

    def begin(
        self, model: Path, out: Path, *more: str, before: Callable[[], object] | None = None
    ) -> Command:
        """Start the command, with further arguments; `before` replaces `first`."""
        arguments = filled((*self.arguments, *more), model, out)
        return Command(*arguments, before=before or self.first)

    def finish(self, model: Path, out: Path) -> None:
        """Run the command to its end, or continue an earlier run."""
        run(self.arguments, model, out, self.first)


def know_tokenizer() -> None:
    """Make llama.cpp's converter accept the model's tokenizer, whose hash it does not know."""
    from conversion.base import TextModel  # slow, and only one command needs it

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"


def _to_zeros(name: str, *options: str) -> Work:
    return Work(name, ("prune", "{model}", *options, *_TEXT, "-o", "{out}"))


def _after_pruning(name: str, *arguments: str) -> Work:
    return Work(name, arguments, ((*_PRUNE, "-o", "{out}"),))


def _export(target: str, *options: str) -> Work:
    return _after_pruning(f"export-{target}", "export", "{out}", "--target", target, *options)


_EXPORTED = ((*_PRUNE, "-o", "{out}"), ("export", "{out}", "--target", "onnx"))

WORKS = (
    _to_zeros("prune-fast", "--pattern", "2:4", "--preset", "fast"),
    _to_zeros("prune-best", "--pattern", "2:4", "--preset", "best", *_TUNE),
    _to_zeros("prune-owl", "--pattern", "unstructured:0.5", "--allocation", "owl", *_TUNE),
    _to_zeros("shrink", "--pattern", "structured:0.25", *_TUNE),
    _to_zeros("recover", "--pattern", "2:4", "--preset", "fast", "--recover", "16"),
    _to_zeros("quantize", "--pattern", "2:4", "--preset", "fast", "--quantize", "int8"),
    # Targets that need neither a GPU nor another program.
    *map(_export, ("onnx", "genai", "packed", "triton", "vllm")),
    replace(_export("gguf", "--dtype", "fp16"), first=know_tokenizer),
    Work(
        "export-compressed-tensors",
        ("export", "{out}", "--target", "compressed-tensors"),
        ((*_PRUNE, "--quantize", "int8:16", "-o", "{out}"),),
    ),
    _after_pruning("eval", "eval", "{out}", *_EVAL),
    Work("bench", ("bench", "{out}", "--dense", "{model}", *_BENCH), _EXPORTED),
    Work("report", ("report", "{out}"), _EXPORTED),
    Work(
        "prune-export",
        (
            *("prune-export", "{model}", "--pattern", "2:4", "--method", "wanda", *_TEXT),
            *("--target", "onnx", *_EVAL, *_BENCH, "-o", "{out}"),
        ),
    ),
)


def settle(folder: Path) -> None:
    """Let all commands share a cache and traced graphs in a folder.

    A trace takes longer than everything else that a command does to a small model.
    """
    os.environ["THANOS_DEPLOY_CACHE"] = str(folder / "cache")
    traces = folder / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    traced.share(traces)


def filled(arguments: Sequence[str], model: Path, out: Path) -> list[str]:
    """Return the arguments with the folders of model and bundle filled in."""
    return [one.format(model=model, out=out) for one in arguments]


def run(
    arguments: Sequence[str],
    model: Path,
    out: Path,
    first: Callable[[], object] | None = None,
) -> None:
    """Run a command that has to succeed; `first` is called first in its process.

    Raises:
        RuntimeError: the exit code is not 0.
    """
    command = Command(*filled(arguments, model, out), before=first)
    _, errors = command.communicate()
    if command.returncode != 0:
        said = errors.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(arguments)}: exit code {command.returncode}\n{said}")


def small_model(folder: Path) -> Path:
    """Write a LLaMA of four blocks, unless it exists."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, "llama", num_hidden_layers=BLOCKS)
    return folder
