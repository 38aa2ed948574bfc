"""Look at a bundle again, from the bytes on: is everything that it says of itself still true?

files      every file against the hash that was recorded when it was written
pattern    every linear layer, in the checkpoint and in each exported graph
parity     what was measured at export, which holds for these very files
engines    from which graph, and which layers run on sparse tensor cores, read again from what
the builder said
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.onnx import graph as onnx
from exporters.tensorrt import engine
from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import Json
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.check import Check
from thanos_deploy.errors import DeployError, IntegrityError
from thanos_deploy.model.assignment import describe
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.verdict import Verdict, judge
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.prune.layers import linear_shapes
from thanos_deploy.prune.result import PRUNE, patterns_of

_REBUILD = "build the engine again with `thanos-deploy export --overwrite`"


def verify(
    bundle: Bundle, *, require_sparse: float | None = None, on_progress: OnProgress = silent
) -> list[Check]:
    """Every check that the bundle allows.

    Args:
        bundle: with the stage prune finished.
        require_sparse: the fraction of the linear layers that has to run on sparse tensor cores,
            in every engine; None for no such demand.
        on_progress: told of every stage.
    """
    bundle.require(layout.PRUNE, "`thanos-deploy prune`")
    checks: list[Check] = []
    stages = list(bundle.stages)
    for index, stage in enumerate(stages):
        on_progress(index, len(stages))
        checks.append(_files(bundle, stage))
        # What is in changed files is not worth a word.
        if checks[-1].outcome == "PASS":
            checks += _contents(bundle, stage)
    on_progress(len(stages), len(stages))
    if require_sparse is not None:
        checks += _demand(bundle, require_sparse)
    return checks


def proofs(bundle: Bundle) -> dict[str, Json]:
    """build.json of every engine, by the name of its stage."""
    return {
        stage: engine.read_build(folder)
        for stage in bundle.stages
        if (folder := _engine_folder(bundle, stage)) is not None
    }


def _engine_folder(bundle: Bundle, stage: str) -> Path | None:
    folder = f"{engine.ENGINES}/{stage}"
    if f"{folder}/{engine.BUILD}" in bundle.stages[stage].files:
        return bundle.path / folder
    return None


def _files(bundle: Bundle, stage: str) -> Check:
    files = bundle.stages[stage].files
    try:
        bundle.verify(stage)
    except IntegrityError as error:
        return Check(f"{stage}: files", "FAIL", error.message, fix=error.fix)
    return Check(f"{stage}: files", "PASS", f"{len(files)} as they were written")


def _contents(bundle: Bundle, stage: str) -> Iterator[Check]:
    if stage == layout.PRUNE:
        yield _pattern(bundle, stage, bundle.path / layout.MODEL)
    elif f"{stage}/{onnx.MODEL}" in bundle.stages[stage].files and stage.startswith("onnx"):
        yield _pattern(bundle, stage, bundle.path / stage / onnx.MODEL)
        yield _parity(bundle, stage)
    elif (folder := _engine_folder(bundle, stage)) is not None:
        yield _graph_of(bundle, stage)
        yield _engine(bundle, stage, folder)


def _pattern(bundle: Bundle, stage: str, path: Path) -> Check:
    name = f"{stage}: pattern"
    if bundle.options(PRUNE).cut:
        return Check(name, "SKIP", "heads and channels were cut out; there is nothing to hold")
    checkpoint = Checkpoint.open(bundle.path / layout.MODEL)
    shapes, patterns = linear_shapes(checkpoint), patterns_of(bundle)
    try:
        verdicts = (
            onnx.judge_file(path, shapes, patterns)
            if path.suffix == ".onnx"
            else _judge_checkpoint(checkpoint, patterns)
        )
    except DeployError as error:
        return Check(name, "FAIL", error.message, fix=error.fix)
    off = [layer for layer, verdict in verdicts.items() if not verdict.holds]
    known = set(bundle.result(PRUNE).layers_off_pattern or ())
    held = (
        f"{len(verdicts) - len(off)} of {len(shapes)} layers hold "
        f"{describe(patterns, len(patterns))}"
    )
    if set(off) <= known:
        others = len(off) or len(verdicts) < len(shapes)
        return Check(
            name, "PASS", held + (", the others were left dense on purpose" if others else "")
        )
    return Check(name, "FAIL", f"{held}; not {', '.join(off)}", fix="export again, or prune again")


def _judge_checkpoint(
    checkpoint: Checkpoint, patterns: Mapping[str, Pattern]
) -> dict[str, Verdict]:
    verdicts = {}
    for name, pattern in patterns.items():
        stored = checkpoint.stored_name(f"{name}.weight")
        (weight,) = checkpoint.weights.read([stored]).values()
        nonzero = (weight.T if checkpoint.family.transposed else weight) != 0
        verdicts[name] = judge(nonzero.numpy(), pattern)
    return verdicts


def _parity(bundle: Bundle, stage: str) -> Check:
    result = bundle.stages[stage].result
    worst = max(case["logits_error"] for case in result["parity"])
    limit = result["parity_limit"]
    return Check(
        f"{stage}: parity",
        "PASS" if worst <= limit else "FAIL",
        f"ONNX Runtime against PyTorch: {worst:.1e} of the logits' range at export, "
        f"limit {limit:g}",
        fix="" if worst <= limit else "export again",
    )


def _graph_of(bundle: Bundle, stage: str) -> Check:
    name, source = f"{stage}: graph", bundle.source_of(stage)
    if bundle.source_is_current(stage):
        return Check(name, "PASS", f"built from {source}/ as it is now")
    return Check(
        name, "FAIL", f"built from another {source}/ than the one that is there", fix=_REBUILD
    )


def _engine(bundle: Bundle, stage: str, folder: Path) -> Check:
    name = f"{stage}: sparse kernels"
    build = engine.read_build(folder)
    source = bundle.source_of(stage)
    graph = folder if (folder / onnx.MODEL).exists() else bundle.path / source
    weights = engine.read_weights(graph / onnx.MODEL, [row["name"] for row in build["layers"]])
    again = engine.proof_of(folder, weights, sparse=build["sparse_weights"], target=build["target"])
    if any(build[part] != again[part] for part in again):
        return Check(
            name, "FAIL", "the verdicts are not those that its own log and graph give", fix=_REBUILD
        )
    summary = again["summary"]
    reasons = Counter(f"{row['verdict']}: {row['reason']}" for row in again["layers"])
    most, count = reasons.most_common(1)[0]
    return Check(
        name,
        "SKIP" if all(row["verdict"] == "not reported" for row in again["layers"]) else "PASS",
        f"{summary['picked']} picked, {summary['eligible']} eligible, {summary['pattern_holds']} "
        f"hold 2:4, of {summary['layers']} layers; {count} {most}",
    )


def _demand(bundle: Bundle, fraction: float) -> Iterator[Check]:
    found = proofs(bundle)
    if not found:
        yield Check(
            f"at least {fraction:.0%} sparse",
            "FAIL",
            "there is no engine",
            fix="run `thanos-deploy export --target tensorrt` on the GPU",
        )
    for stage, build in found.items():
        picked, layers = build["summary"]["picked"], build["summary"]["layers"]
        enough = picked >= fraction * layers
        yield Check(
            f"{stage}: at least {fraction:.0%} sparse",
            "PASS" if enough else "FAIL",
            f"{picked} of {layers} linear layers are proven to run on sparse tensor cores",
            fix=""
            if enough
            else "see the reason of each layer with --layers; a dense kernel that is faster is no "
            "fault of the engine",
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found, for machines.

    Attributes:
        bundle: name of its folder.
        checks: all of them.
        engines: the verdict on every layer of every engine, by the name of its stage.
    """

    bundle: str
    checks: tuple[Check, ...]
    engines: Mapping[str, Sequence[Json]]


def verification(checks: Sequence[Check], bundle: Bundle) -> Verification:
    """The checks, and the verdict on every layer of every engine."""
    engines = {stage: build["layers"] for stage, build in proofs(bundle).items()}
    return Verification(bundle.path.name, tuple(checks), engines)
