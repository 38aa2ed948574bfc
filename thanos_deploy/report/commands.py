"""The command lines that make a bundle again, from the recorded options of its stages."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from exporters import targets
from exporters.target import Target
from thanos_deploy import methods
from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.bundle.manifest import StageRecord
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.run import BENCH, DENSE, PRUNED
from thanos_deploy.option import Options, options_by_name, options_of
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.pruning.recipe import PRESET
from thanos_deploy.pruning.result import PRUNE, PruneOptions
from thanos_deploy.report.sources import Sources
from thanos_deploy.shrink.options import PRESETS as CUTS
from thanos_deploy.shrink.options import Fit, Sizing

_TOOL = "thanos-deploy"

# Options whose name on the command line is not their name in the manifest.
_EVAL = {
    "text": "--eval-text",
    "segments": "--eval-segments",
    "seqlen": "--eval-seqlen",
    "questions": "--eval-questions",
    "folder": "--task-folder",
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
    """Return the command lines that make a bundle again, in the order in which its stages finished.

    Each stage has one command line; the stage bench has one for each run. OUT stands for the
    bundle. Models and texts have the names that they had then: the manifest records no paths, but
    it has the hashes that tell whether a file is the same.
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
                asked = _flags(record.options, _EVAL)
                words = ["eval", "OUT", "--dense", source.name, *runtime, *asked]
            case layout.BENCH:
                made += [
                    shlex.join([_TOOL, "bench", "OUT", *_bench(source.name, options)])
                    for options in sources.bundle.options(BENCH).values()
                ]
                continue
            case _:
                target = targets.of_stage(stage)
                if target is None or not target.asked_for(stage):
                    continue  # the command line of another stage makes this one too
                words = ["export", "OUT", "--target", target.name, *_export(target, record)]
        made.append(shlex.join([_TOOL, *words]))
    return made


def _export(target: Target[Any, Any], record: StageRecord) -> Iterator[str]:
    """Yield those recorded options of the stage that are options of the target, as words."""
    known = options_by_name(target.options)
    for name, value in record.options.items():
        if name not in known or value is None or value == []:
            continue
        declared = known[name].declared
        yield declared.flag
        values = value if isinstance(value, list) else [value]
        yield ",".join(str(one).removeprefix(declared.prefix or "") for one in values)


def _pruning(pruned: PruneOptions) -> Iterator[str]:
    if isinstance(parse(pruned.pattern), Structured) and not pruned.cut:
        yield "--keep-shape"
    options = encode(replace(pruned, cut=False))  # `cut` is a record, not an option
    match options.pop("true_sequential", None):
        case True:
            yield "--true-sequential"
        case False:
            yield "--block-statistics"
    for option in ("include", "ignore"):
        for layers in options.pop(option, ()):
            yield from (f"--{option}", layers)
    own = methods.load(pruned.method)
    flags = {
        one.name: one.declared.flag
        for kind in (Sizing, Fit, own.options)
        for one in options_of(kind)
    }
    yield from _flags(options, flags)
    # A record leaves out an option that was added later if it has its default. Where the default
    # preset sets such an option, the command line has to give that default.
    usual: Sequence[Options] = (CUTS[PRESET].tuning,)
    if not pruned.cut:
        usual = own.preset(PRESET).options, own.preset(PRESET).walk
    for options_ in usual:
        said = encode(options_).keys() - encode(type(options_)()).keys() - options.keys()
        yield from _flags({name: getattr(type(options_)(), name) for name in sorted(said)}, flags)


def _bench(model: str, request: BenchRequest) -> Iterator[str]:
    others = [label for label in request.subjects if label != PRUNED]
    if others == [f"{PRUNED}-again"]:
        yield "--aa"
    else:
        for label in others:  # the label of a bundle is the name of its folder
            yield from ("--against", label)
    if DENSE in others:
        yield from ("--dense", model)
    for kind in request.kinds:
        yield from ("--scenario", kind)
    yield from _flags(
        {name: value for name, value in encode(request).items() if name in _BENCH}, _BENCH
    )


def _flags(options: Json, names: dict[str, str]) -> Iterator[str]:
    """Yield options as words of a command line; options that are None were not given."""
    for name, value in options.items():
        if value is None:
            continue
        yield names.get(name, f"--{name.replace('_', '-')}")
        yield ",".join(map(str, value)) if isinstance(value, list) else str(value)
