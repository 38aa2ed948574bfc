"""The one place where keyword arguments become what the stages are asked for."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thanos_deploy.api.options import (
    ModelLike,
    PatternLike,
    Progress,
    PruneExportOptions,
    PruneOptions,
)
from thanos_deploy.errors import UsageError
from thanos_deploy.pattern import Pattern, parse
from thanos_deploy.progress import Announce, OnProgress, quietly

if TYPE_CHECKING:
    from thanos_deploy.measure.options import BenchRequest, EvalRequest, TaskRequest
    from thanos_deploy.model.locate import LocatedModel
    from thanos_deploy.stages.request import PruneRequest


def announce(progress: Progress | None) -> Announce:
    """Progress as the stages tell it."""
    if progress is None:
        return quietly

    def begin(title: str) -> OnProgress:
        def on_progress(done: int, total: int) -> None:
            progress(title, done, total)

        return on_progress

    return begin


def pattern(value: PatternLike) -> Pattern:
    """A pattern from its spelling.

    Raises:
        PatternError: it cannot be read.
    """
    return parse(value) if isinstance(value, str) else value


def model(value: ModelLike) -> "str | LocatedModel":
    """A model as the stages find it; one in memory is written to the cache.

    Raises:
        UsageError: neither a name, nor a path, nor a model and its tokenizer.
        DeployError: see `dense.hold`.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if not (isinstance(value, tuple) and len(value) == 2):
        raise UsageError(
            f"the argument model is of type {type(value).__name__}",
            fix="give a hub id, a path, or the pair (model, tokenizer)",
        )
    from thanos_deploy.stages.dense import hold

    return hold(*value)


def prune_request(wanted: PatternLike, options: Mapping[str, Any]) -> "PruneRequest":
    """How to prune; the options of every method are known, whether `PruneOptions` has them or not.

    Raises:
        UsageError: there is no such option, options contradict each other, or a value is out of
            range.
    """
    from thanos_deploy.stages.request import PruneRequest

    return PruneRequest.of(pattern(wanted), **plain(options))


def eval_request(options: Mapping[str, Any]) -> "EvalRequest":
    """Which text to judge on, and how much of it."""
    from thanos_deploy.measure.options import EvalRequest

    return EvalRequest(**plain(options))


def bench_request(options: Mapping[str, Any], **defaults: Any) -> "BenchRequest":
    """What to time.

    Args:
        options: called as the command's; None for what was not given.
        defaults: where they differ from the request's own.
    """
    from thanos_deploy.measure.options import BenchRequest

    names = {"scenario": "kinds", "batch": "batches", "prompt": "prompts", "past": "pasts"}
    given = {names.get(name, name): value for name, value in plain(options).items()}
    if "prompts" in given:
        given = {"pasts": None, **given}
    return BenchRequest(**{**defaults, **given})


def export_request(options: Mapping[str, Any]) -> dict[str, object]:
    """What is asked of a target, by the names of its fields; see `Target.request`."""
    from exporters import targets
    from thanos_deploy.option import options_of

    known = {
        one.keyword: (one.name, one.declared.prefix)
        for target in targets.every()
        for one in options_of(target.options)
    }
    asked: dict[str, object] = {}
    for keyword, value in plain(options).items():
        name, prefix = known.get(keyword, (keyword, None))
        asked[name] = value if prefix is None else tuple(f"{prefix}{one}" for one in value)
    return asked


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was given: sequences as tuples, paths as text."""

    def entry(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: entry(value) for name, value in options.items() if value is not None}


def quality_request(
    *,
    runtime: str,
    device: str,
    tasks: Sequence[str] | None,
    task_folder: str | os.PathLike[str] | None,
    limit: int | None,
    **text: Any,
) -> "EvalRequest | TaskRequest":
    """Perplexity on a text, or tasks.

    Raises:
        UsageError: options that are for something else.
    """
    from thanos_deploy.measure.options import EvalRequest, TaskRequest

    if tasks is None and (task_folder is not None or limit is not None):
        raise UsageError(
            "--task-folder and --limit have an effect only with --tasks",
            fix="leave them out, or give --tasks",
        )
    if runtime != "torch":
        if device not in ("auto", "cpu"):
            raise UsageError(
                "--device has an effect only with --runtime torch; graphs run on the CPU, "
                "and a server on the device that it was started with",
                fix="leave --device out",
            )
        device = "cpu"
    if tasks is None:
        return EvalRequest(**plain(text), device=device)
    folder = None if task_folder is None else os.fspath(task_folder)
    return TaskRequest(tuple(tasks), folder, limit, device)


def server(runtime: str, url: str | None) -> str | None:
    """The address of the server that runs a model; None where none does.

    Raises:
        UsageError: there is an address without a server, or a server without one.
    """
    if (runtime == "vllm") != (url is not None):
        raise UsageError(
            "--runtime vllm and --url go together"
            if url is None
            else f"--url {url} with --runtime {runtime}",
            fix="give both --runtime vllm and --url with the address of the server, or neither",
        )
    return url


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What `prune_export` is asked for, stage by stage."""

    prune: "PruneRequest"
    evaluation: "EvalRequest"
    benchmarking: "BenchRequest"
    target: str
    asked: Mapping[str, object]

    @classmethod
    def of(cls, wanted: PatternLike, options: PruneExportOptions) -> "Pipeline":
        """From the keyword arguments."""

        def part(*names: str, prefix: str = "") -> dict[str, Any]:
            given: Mapping[str, Any] = options
            return {name: given[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in given}

        own = set(inspect.get_annotations(PruneExportOptions))
        own -= set(inspect.get_annotations(PruneOptions))
        shared = part("text_field", "device")
        return cls(
            prune_request(wanted, part(*(name for name in options if name not in own))),
            eval_request(
                {**shared, **part("text", "segments", "seqlen", "questions", prefix="eval_")}
            ),
            bench_request(part("batch", "prompt", "past", "new_tokens", "rounds", "sample_prompt")),
            part("target").get("target", "onnx"),
            export_request(
                part("max_seq", "logits", "graph", "seq", "sm", "sparse_form", "engine_compat")
            ),
        )
