"""Conversion of the API's keyword arguments into the requests of the stages."""

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
    """Adapt a progress callback to the form in which the stages report progress."""
    if progress is None:
        return quietly

    def begin(title: str) -> OnProgress:
        def on_progress(done: int, total: int) -> None:
            progress(title, done, total)

        return on_progress

    return begin


def pattern(value: PatternLike) -> Pattern:
    """Return a pattern, parsed if it is given as text.

    Raises:
        PatternError: the text is not a pattern.
    """
    return parse(value) if isinstance(value, str) else value


def model(value: ModelLike) -> "str | LocatedModel":
    """Return a model as the stages take it; a model in memory is first written to the cache.

    Raises:
        UsageError: the value is neither a name, nor a path, nor a pair of model and tokenizer.
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
    """Build the request of the stage prune.

    The options of every method are accepted, even those that `PruneOptions` does not list.

    Raises:
        UsageError: there is no such option, options contradict each other, or a value is out of
            range.
    """
    from thanos_deploy.stages.request import PruneRequest

    return PruneRequest.of(pattern(wanted), **plain(options))


def eval_request(options: Mapping[str, Any]) -> "EvalRequest":
    """Build the request for an evaluation on a text."""
    from thanos_deploy.measure.options import EvalRequest

    return EvalRequest(**plain(options))


def bench_request(options: Mapping[str, Any], **defaults: Any) -> "BenchRequest":
    """Build the request for a benchmark.

    Args:
        options: values by the names of the command's options; None for an option not given.
        defaults: defaults that differ from those of `BenchRequest`, by its fields.
    """
    from thanos_deploy.measure.options import BenchRequest

    names = {"scenario": "kinds", "batch": "batches", "prompt": "prompts", "past": "pasts"}
    given = {names.get(name, name): value for name, value in plain(options).items()}
    if "prompts" in given:
        given = {"pasts": None, **given}
    return BenchRequest(**{**defaults, **given})


def export_request(options: Mapping[str, Any]) -> dict[str, object]:
    """Rename export options to the fields of the targets' option classes; see `Target.request`."""
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
    """Drop options that are None, and turn sequences into tuples and paths into text."""

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
    """Build the request for an evaluation on a text, or on tasks if any are given.

    Raises:
        UsageError: an option has no effect together with the others.
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
    """Return the address of the server that runs the model; None for other runtimes.

    Raises:
        UsageError: the runtime is "vllm" without an address, or an address is given for another
            runtime.
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
    """The requests of `prune_export` for its stages."""

    prune: "PruneRequest"
    evaluation: "EvalRequest"
    benchmarking: "BenchRequest"
    target: str
    asked: Mapping[str, object]

    @classmethod
    def of(cls, wanted: PatternLike, options: PruneExportOptions) -> "Pipeline":
        """Build the requests from the keyword arguments."""

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
