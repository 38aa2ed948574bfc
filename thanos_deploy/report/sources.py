"""What a report is made from: a bundle, and its records that are too long for the manifest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thanos_deploy.bundle import names
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import MANIFEST, Bundle, StageRecord
from thanos_deploy.errors import InputError
from thanos_deploy.report.runs import PRUNED

BENCH_FORMAT = "thanos-deploy/bench/1"
BUILD_FORMAT = "thanos-deploy/build/1"

_LAYERS = "layers.json"
_SAMPLE = "bench/sample.json"
_EXPORT = "onnx/export.json"
_CONFIG = "model/config.json"


@dataclass(frozen=True, slots=True)
class Sources:
    """A bundle and its records.

    Attributes:
        bundle: the bundle.
        stages: its stages that are about the model as it is now.
        stale: names of the stages that were made from an earlier one.
        blocks: layers.json, one entry a block.
        config: of the pruned model; None if it is not in the bundle.
        weights: those of the exported graph, from export.json.
        runs: content of bench/<run>.json, raw samples included, by the file's name, in the order in
            which they were measured; those that were interrupted are last.
        unrecorded: names of the runs that the manifest does not have.
        sample: the texts that the models wrote, if any.
        engines: content of engines/*/build.json, by the file's name.
    """

    bundle: Bundle
    stages: dict[str, StageRecord]
    stale: tuple[str, ...]
    blocks: list[Json]
    config: Json | None = None
    weights: list[Json] = field(default_factory=list)
    runs: dict[str, Json] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    sample: Json | None = None
    engines: dict[str, Json] = field(default_factory=dict)


def read(bundle: Bundle) -> Sources:
    """Collect what a bundle has to say; what it has not finished is left out.

    Raises:
        InputError: nothing was pruned yet, or a record is not readable.
        IntegrityError: a record was changed since it was written.
    """
    bundle.require("prune", f"`thanos-deploy prune MODEL -o {bundle.path} --pattern 2:4`")
    known = {
        name: record
        for name, record in bundle.stages.items()
        if name != "report"
        if name != "bench" or "runs" in record.result  # runs had no names once
    }
    stale = tuple(name for name in known if _is_stale(bundle, name))
    stages = {name: record for name, record in known.items() if name not in stale}
    # Without a stage there may be a run that was interrupted.
    measured = "bench" in stages or "bench" not in bundle.stages
    runs = _runs(bundle, stages.get("bench")) if measured else {}
    return Sources(
        bundle=bundle,
        stages=stages,
        stale=stale,
        blocks=_read(bundle, _LAYERS),
        config=_read(bundle, _CONFIG) if (bundle.path / _CONFIG).is_file() else None,
        weights=_read(bundle, _EXPORT)["weights"] if "onnx" in stages else [],
        runs=runs,
        unrecorded=tuple(name for name in runs if not bundle.recorded(name)),
        sample=_read(bundle, _SAMPLE) if measured and (bundle.path / _SAMPLE).is_file() else None,
        engines={
            name: content
            for name in _names(bundle, "engines/*/build.json")
            if not any(name in bundle.stages[stage].files for stage in stale)
            if (content := _read(bundle, name)).get("format") == BUILD_FORMAT
        },
    )


def _runs(bundle: Bundle, bench: StageRecord | None) -> dict[str, Json]:
    """Those of the stage, in its order, and what else is in the folder."""
    finished = [f"bench/{run}.json" for run in (bench.result["runs"] if bench else ())]
    files = dict.fromkeys((*finished, *_names(bundle, "bench/*.json")))
    return {
        name: content
        for name in files
        if name != _SAMPLE and (content := _read(bundle, name)).get("format") == BENCH_FORMAT
    }


def share(bundles: Sequence[Sources]) -> list[Sources]:
    """Let each bundle have the runs of the others in which its own graph was timed too.

    `bench A --against B` leaves one run, in A; seen from B it is a run of B beside A.
    """
    return [replace(one, runs={**_runs_of_others(one, bundles), **one.runs}) for one in bundles]


def _runs_of_others(one: Sources, bundles: Sequence[Sources]) -> dict[str, Json]:
    found = {}
    for other in bundles:
        if other is one or "onnx" not in one.stages or "bench" not in other.stages:
            continue
        owner = other.bundle.path.resolve().name
        for run, graphs in other.stages["bench"].inputs.items():
            content = other.runs[f"bench/{run}.json"]
            for label, graph in graphs.items():
                itself = label in (PRUNED, content["baseline"])
                if graph == one.bundle.graph_sha256 and not itself:
                    found[f"{owner}/{run}"] = _seen_from(content, label, owner)
    return found


def _seen_from(run: Json, label: str, owner: str) -> Json:
    """A run of another bundle, its owner, as one of the subject `label` beside the baseline."""
    baseline = owner if run["baseline"] == PRUNED else run["baseline"]
    renamed = {run["baseline"]: baseline, label: PRUNED}

    def own(values: Json) -> Json:
        return {new: values[old] for old, new in renamed.items()}

    return {
        **run,
        "run": f"{run['run']} of {owner}",
        "owner": owner,
        "baseline": baseline,
        "subjects": own(run["subjects"]),
        "scenarios": [{**one, "results": own(one["results"])} for one in run["scenarios"]],
    }


def _is_stale(bundle: Bundle, stage: str) -> bool:
    """A stage was made from another model or another graph than the bundle has now."""
    inputs = bundle.stages[stage].inputs
    if stage in ("prune", "report"):  # the first one reads the dense model, the last one all
        return False
    if "model" in inputs and inputs["model"] != bundle.model_sha256:
        return True
    graphs = [run[PRUNED] for run in inputs.values()] if stage == "bench" else []
    graphs += [inputs["onnx"]] if "onnx" in inputs else []
    return bool(graphs) and (
        "onnx" not in bundle.stages
        or _is_stale(bundle, "onnx")
        or any(graph != bundle.graph_sha256 for graph in graphs)
    )


def _names(bundle: Bundle, glob: str) -> list[str]:
    return sorted(
        path.relative_to(bundle.path).as_posix()
        for path in bundle.path.glob(glob)
        if path.name[0] != "."
    )


def _read(bundle: Bundle, name: str) -> Any:
    """The content of a record, compared with its hash where the manifest has one."""
    names.plain(name, bundle.path / MANIFEST, nested=True)
    if bundle.recorded(name):
        bundle.verify_file(name)
    path = bundle.path / name
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error})",
            fix="restore the file from a copy of the bundle, or repeat the command that wrote it "
            "with --overwrite",
        ) from error
