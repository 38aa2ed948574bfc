"""The command lines that make a bundle again, from the options that its stages were made with."""

import shlex
from collections.abc import Iterator
from dataclasses import replace

from thanos_deploy import methods
from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.bundle.manifest import StageRecord
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.run import BENCH, DENSE, PRUNED
from thanos_deploy.option import options_of
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.prune.result import PRUNE, PruneOptions
from thanos_deploy.report.sources import Sources
from thanos_deploy.shrink.options import Fit, Sizing

_TOOL = "thanos-deploy"

# Options whose name on the command line is not their name in the manifest.
_EVAL = {
    "text": "--eval-text",
    "segments": "--eval-segments",
    "seqlen": "--eval-seqlen",
    "folder": "--task-folder",
}
_EXPORT = {"max_sequence": "--max-seq"}
_ENGINE = {
    "max_sequence": "--max-seq",
    "prompt": "--seq",
    "form": "--sparse-form",
    "compatibility": "--engine-compat",
}
_BENCH = {
    "run": "--run",
    "batches": "--batch",
    "prompts": "--prompt",
    "pasts": "--past",
    "new_tokens": "--new-tokens",
    "rounds": "--rounds",
    "requests": "--requests",
    "rate": "--rate",
    "driver": "--driver",
    "provider": "--provider",
    "threads": "--threads",
    "sample_prompt": "--sample-prompt",
}


def of(sources: Sources) -> list[str]:
    """One command line a stage, in the order in which they finished.

    OUT is the bundle. Models and texts are called as they were then; the manifest has no paths, but
    the hashes that tell whether a file is the same.
    """
    source = sources.bundle.source
    made = []
    for stage, record in sources.stages.items():
        match stage:
            case layout.PRUNE:
                revision = ["--revision", source.revision] if source.revision else []
                words = ["prune", source.name, "-o", "OUT", *revision]
                words += _pruning(sources.bundle.options(PRUNE))
            case "eval" | "eval-onnx" | "eval-tasks" | "eval-tasks-onnx":
                runtime = ["--runtime", "onnx"] if stage.endswith("-onnx") else []
                flags = _flags(record.options, _EVAL)
                words = ["eval", "OUT", "--dense", source.name, *runtime, *flags]
            case layout.ONNX:
                words = ["export", "OUT", "--target", "onnx", *_flags(record.options, _EXPORT)]
            case "genai" | "packed" | "triton":
                words = ["export", "OUT", "--target", stage]
            case layout.BENCH:
                made += [
                    shlex.join([_TOOL, "bench", "OUT", *_bench(source.name, options)])
                    for options in sources.bundle.options(BENCH).values()
                ]
                continue
            case _:
                target = _target(sources, record)
                if target is None:  # the graph of an engine, made with it
                    continue
                words = ["export", "OUT", "--target", target, *_engine(record.options)]
        made.append(shlex.join([_TOOL, *words]))
    return made


def _target(sources: Sources, record: StageRecord) -> str | None:
    """What an engine was built for, from its own record."""
    return next(
        (build["target"] for name, build in sources.engines.items() if name in record.files), None
    )


def _engine(options: Json) -> Iterator[str]:
    options = dict(options)
    architectures = options.pop("architectures", None) or []
    if architectures:
        options["sm"] = [name.removeprefix("sm") for name in architectures]
    yield from _flags(options, _ENGINE)


def _pruning(pruned: PruneOptions) -> Iterator[str]:
    if isinstance(parse(pruned.pattern), Structured) and not pruned.cut:
        yield "--keep-shape"
    options = encode(replace(pruned, cut=False))  # which is no option
    match options.pop("true_sequential", None):
        case True:
            yield "--true-sequential"
        case False:
            yield "--block-statistics"
    for option in ("include", "ignore"):
        for layers in options.pop(option, ()):
            yield from (f"--{option}", layers)
    declared = (Sizing, Fit, methods.load(pruned.method).options)
    flags = {one.name: one.declared.flag for kind in declared for one in options_of(kind)}
    yield from _flags(options, flags)


def _bench(model: str, request: BenchRequest) -> Iterator[str]:
    others = [label for label in request.subjects if label != PRUNED]
    if others == [f"{PRUNED}-again"]:
        yield "--aa"
    else:
        for label in others:  # a bundle is called like its folder
            yield from ("--against", label)
    if DENSE in others:
        yield from ("--dense", model)
    for kind in request.kinds:
        yield from ("--scenario", kind)
    yield from _flags(
        {name: value for name, value in encode(request).items() if name in _BENCH}, _BENCH
    )


def _flags(options: Json, names: dict[str, str]) -> Iterator[str]:
    """Options as words of a command line; None stands for what was left out."""
    for name, value in options.items():
        if value is None:
            continue
        yield names.get(name, f"--{name.replace('_', '-')}")
        yield ",".join(map(str, value)) if isinstance(value, list) else str(value)
