"""The sources of a report: a bundle, and its records that are too long for the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from thanos_deploy.bundle import layout, names
from thanos_deploy.bundle.codec import Json
from thanos_deploy.bundle.engine_record import BuildRecord
from thanos_deploy.bundle.files import read_json, record_in
from thanos_deploy.bundle.graph_record import WeightRecord, read_graph_record
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.bundle.record import Inputs, Options, Result, Stage
from thanos_deploy.errors import InputError
from thanos_deploy.measure import run as bench
from thanos_deploy.measure.run import BENCH, PRUNED, Run, Sample, has_named_runs
from thanos_deploy.pruning.result import PRUNE, PrunedBlock
from thanos_deploy.shrink.result import CutBlock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sources:
    """A bundle and its records.

    Attributes:
        bundle: the bundle.
        stages: finished stages that were made from the current model.
        stale: names of the stages that were made from an earlier version of the model.
        blocks: content of layers.json, one entry for each block.
        config: config.json of the pruned model; None if it is not in the bundle.
        weights: the weights of the exported graph, from export.json.
        runs: content of bench/<run>.json with raw samples, by path in the bundle. Recorded
            runs come first, in the order in which they were measured.
        unrecorded: paths of the runs that are not in the manifest, such as interrupted ones.
        sample: the texts that the models generated; None if there are none.
        engines: content of engines/*/build.json, by path in the bundle.
    """

    bundle: Bundle
    stages: Mapping[str, StageRecord]
    stale: tuple[str, ...]
    blocks: tuple[PrunedBlock, ...] | tuple[CutBlock, ...]
    config: Json | None = None
    weights: Sequence[WeightRecord] = ()
    runs: Mapping[str, Run] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    sample: Sample | None = None
    engines: Mapping[str, BuildRecord] = field(default_factory=dict)

    def has(self, stage: Stage[Options, Inputs, Result]) -> bool:
        """Whether a stage is finished and was made from the current model."""
        return stage.name in self.stages


def read(bundle: Bundle) -> Sources:
    """Read the records of a bundle; stages that are not finished are left out.

    Raises:
        InputError: nothing was pruned yet, or a record is not readable.
        IntegrityError: a record was changed since it was written.
    """
    bundle.require(layout.PRUNE, f"`thanos-deploy prune MODEL -o {bundle.path} --pattern 2:4`")
    known = [
        name
        for name in bundle.stages
        if name != layout.REPORT and (name != BENCH.name or has_named_runs(bundle))
    ]
    stale = tuple(name for name in known if _is_stale(bundle, name))
    stages = {name: bundle.stages[name] for name in known if name not in stale}
    # If the stage bench is not finished, there may still be the file of an interrupted run.
    measured = BENCH.name in stages or not bundle.has(BENCH)
    runs = _runs(bundle, finished=BENCH.name in stages) if measured else {}
    return Sources(
        bundle=bundle,
        stages=stages,
        stale=stale,
        blocks=_read(bundle, layout.LAYERS, tuple[CutBlock, ...])
        if bundle.options(PRUNE).cut
        else _read(bundle, layout.LAYERS, tuple[PrunedBlock, ...]),
        config=_read(bundle, layout.CONFIG, Json) if _is_there(bundle, layout.CONFIG) else None,
        weights=_weights(bundle) if layout.ONNX in stages else (),
        runs=runs,
        unrecorded=tuple(name for name in runs if not bundle.recorded(name)),
        sample=_read(bundle, layout.SAMPLE, Sample)
        if measured and _is_there(bundle, layout.SAMPLE)
        else None,
        engines={
            name: record
            for name in _names(bundle, f"{layout.ENGINES}/*/{layout.BUILD}")
            if bundle.recorded(name)
            and not any(name in bundle.stages[stage].files for stage in stale)
            if (record := _versioned(bundle, name, layout.BUILD_FORMAT, BuildRecord))
        },
    )


def _weights(bundle: Bundle) -> Sequence[WeightRecord]:
    """Read the weights of the exported graph."""
    name = f"{layout.ONNX}/{layout.GRAPH_RECORD}"
    bundle.verify_file(name)
    return read_graph_record(bundle.path / name).weights


def _runs(bundle: Bundle, *, finished: bool) -> dict[str, Run]:
    """Read the runs of the stage bench in its order, then the other runs in its folder."""
    known = [layout.run(name) for name in bundle.result(BENCH).runs] if finished else []
    found = {}
    for name in dict.fromkeys((*known, *_names(bundle, f"{layout.BENCH}/*.json"))):
        if name != layout.SAMPLE and (run := _versioned(bundle, name, bench.FORMAT, Run)):
            found[name] = run
    return found


def share(bundles: Sequence[Sources]) -> list[Sources]:
    """Add to each bundle those runs of the other bundles that timed its graph too.

    `bench A --against dense --against B` writes one run, into bundle A. A report on both bundles
    shows it for B too, as a run of B with the same baseline. B as the baseline gets no such run.
    """
    return [replace(one, runs={**_runs_of_others(one, bundles), **one.runs}) for one in bundles]


def _runs_of_others(one: Sources, bundles: Sequence[Sources]) -> dict[str, Run]:
    found = {}
    for other in bundles:
        if other is one or layout.ONNX not in one.stages or not other.has(BENCH):
            continue
        owner = other.bundle.path.resolve().name
        for name, graphs in other.bundle.inputs(BENCH).items():
            content = other.runs[layout.run(name)]
            for label, graph in graphs.items():
                itself = label in (PRUNED, content.baseline)
                if graph == one.bundle.graph_sha256 and not itself:
                    found[f"{owner}/{name}"] = _seen_from(content, label, owner)
    return found


def _seen_from(run: Run, label: str, owner: str) -> Run:
    """Return a run of another bundle as a run of the subject `label` beside the baseline.

    Args:
        run: the run.
        label: label that this bundle's graph has in the run; it becomes "pruned".
        owner: name of the bundle that the run belongs to.
    """
    baseline = owner if run.baseline == PRUNED else run.baseline
    renamed = {run.baseline: baseline, label: PRUNED}

    def own(values: Mapping[str, T]) -> dict[str, T]:
        return {new: values[old] for old, new in renamed.items()}

    return replace(
        run,
        run=f"{run.run} of {owner}",
        owner=owner,
        baseline=baseline,
        subjects=own(run.subjects),
        scenarios=tuple(replace(one, results=own(one.results)) for one in run.scenarios),
    )


def _is_stale(bundle: Bundle, stage: str) -> bool:
    """Whether a stage was made from another model or graph than the bundle has now."""
    if stage in (layout.PRUNE, layout.REPORT):  # prune reads the dense model, report everything
        return False
    if stage == BENCH.name:
        return any(
            not _is_current_graph(bundle, run.get(PRUNED, {}))
            for run in bundle.inputs(BENCH).values()
        )
    inputs = bundle.stages[stage].inputs
    if inputs.get("model", bundle.model_sha256) != bundle.model_sha256:
        return True
    return layout.ONNX in inputs and not _is_current_graph(bundle, inputs[layout.ONNX])


def _is_current_graph(bundle: Bundle, hashes: Mapping[str, str]) -> bool:
    """Whether these are the hashes of the bundle's graph, and the graph is of its current model."""
    return (
        layout.ONNX in bundle.stages
        and not _is_stale(bundle, layout.ONNX)
        and hashes == bundle.graph_sha256
    )


def _names(bundle: Bundle, glob: str) -> list[str]:
    return sorted(
        path.relative_to(bundle.path).as_posix()
        for path in bundle.path.glob(glob)
        if path.name[0] != "."
    )


def _is_there(bundle: Bundle, name: str) -> bool:
    return (bundle.path / name).is_file()


def _read(bundle: Bundle, name: str, cls: type[T]) -> T:
    """Read a record and check its hash if the manifest has it."""
    return record_in(bundle.path / name, _content(bundle, name), cls)


def _versioned(bundle: Bundle, name: str, form: str, cls: type[T]) -> T | None:
    """Read a record that names its format; None for a file that is no record of this format.

    Raises:
        InputError: it is a record of another version of the format.
    """
    content = _content(bundle, name)
    found = str(content.get("format")) if isinstance(content, dict) else ""
    if found != form and found.startswith(form.rpartition("/")[0]):
        raise InputError(
            f"{bundle.path / name}: format {found!r}; this version reads {form!r}",
            fix="use the version of thanos-deploy that wrote it, or make that stage again with "
            "--overwrite",
        )
    return record_in(bundle.path / name, content, cls) if found == form else None


def _content(bundle: Bundle, name: str) -> object:
    names.plain(name, bundle.path / layout.MANIFEST, nested=True)
    if bundle.recorded(name):
        bundle.verify_file(name)
    return read_json(bundle.path / name)
