"""The stage bench: measure exported models, which take turns."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporters.options import GRAPHS, exported_with
from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from runtime.text import open_tokenizer
from thanos_deploy.bundle import layout, manifest, names
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import write_record
from thanos_deploy.bundle.graph_record import GraphResult
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import differences
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.measure import benchmark, traffic
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.measure.run import (
    BENCH,
    DENSE,
    PRUNED,
    BenchResult,
    Run,
    Sample,
    Subject,
    has_named_runs,
)
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.stages.dense import Dense, dense_folder
from thanos_deploy.stages.export import export_dense


def compared(
    bundle: Bundle,
    against: Sequence[str],
    dense: Dense | None,
    *,
    different_models: bool = False,
    announce: Announce = quietly,
) -> dict[str, Bundle]:
    """Return a bundle and the bundles to compare it with, by label, the baseline first.

    Args:
        bundle: a bundle whose stage onnx is finished; its label is "pruned".
        against: "dense" for the model that the bundle was made from, else folders of bundles. The
            first entry is the baseline.
        dense: the dense model, exported if needed; None to use only an export that the cache has.
        different_models: allow bundles of another base model or with another tokenizer.
        announce: told of each task.

    Returns:
        bundles by label, the baseline first. The label of another bundle is the name of its folder.

    Raises:
        InputError: a bundle, its graph, or the graph of the dense model is missing.
        UsageError: a bundle is compared with itself, two bundles have the same label, or their
            models differ.
    """
    others: dict[str, Bundle] = {}
    for name in against:
        other = bundle if name == DENSE else Bundle.open(Path(name))
        label = name if name == DENSE else other.path.resolve().name
        itself = name != DENSE and (label == DENSE or other.path.samefile(bundle.path))
        if itself or label in (PRUNED, *others):
            raise UsageError(
                f"--against {name}: the same model is named twice, or two models have the "
                f"name {label!r}",
                fix="name each bundle once, in folders of different names; --aa compares a bundle "
                "with itself",
            )
        other.require(layout.ONNX, f"`thanos-deploy export {other.path} --target onnx`")
        if not different_models:
            _require_same_model(bundle, other)
        others[label] = other
    if DENSE in others:  # after all other checks, because its export takes minutes
        others[DENSE] = _dense_export(bundle, dense, announce)
    baseline, *further = others
    return {
        baseline: others[baseline],
        PRUNED: bundle,
        **{label: others[label] for label in further},
    }


def bench(
    bundle: Bundle,
    subjects: Mapping[str, Bundle],
    request: BenchRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Run:
    """Measure exported models in turns and keep the run in a bundle, unless it is finished.

    Args:
        bundle: the bundle that keeps the run, beside its runs of other names.
        subjects: the result of `compared`, or the bundle alone under several labels.
        request: what to measure.
        overwrite: redo a run of the same name that was made with other options.
        announce: told of each task.

    Returns:
        the run without its raw samples.

    Raises:
        UsageError: the sequences of the request are too long for a model, or a run of the same name
            was made with other options and `overwrite` is false.
        PlatformError: the load driver is not installed.
        KeyboardInterrupt: the user interrupted; if a round was complete, the complete rounds are in
            `bench/RUN.interrupted.json`.
    """
    request.check(min(max_sequence(one) for one in subjects.values()))
    if request.driver == "loadgen":
        traffic.loadgen_library()
    check_bench(bundle, request, list(subjects), overwrite=overwrite)
    before = _finished_runs(bundle)
    others = _other_runs(bundle, before, request.run)
    graphs = {label: subject.graph_sha256 for label, subject in subjects.items()}
    inputs = {**{name: run.inputs for name, run in others.items()}, request.run: graphs}
    options = {
        **{name: run.options for name, run in others.items()},
        request.run: replace(request, subjects=tuple(subjects)),
    }

    def produce(folder: Path) -> BenchResult:
        (folder / layout.BENCH).mkdir()
        run = benchmark.measure(
            {label: subject.path for label, subject in subjects.items()},
            {label: describe(subject) for label, subject in subjects.items()},
            request,
            same=len({subject.path for subject in subjects.values()}) == 1,
            on_progress=announce("Measure latency and memory in turns"),
        )
        if run.status == "INTERRUPTED":
            (bundle.path / layout.BENCH).mkdir(exist_ok=True)
            write_record(bundle.path / layout.interrupted_run(request.run), run)
            raise KeyboardInterrupt
        write_record(folder / layout.run(request.run), run)
        for name in others:
            bundle.verify_file(layout.run(name))
            shutil.copy(bundle.path / layout.run(name), folder / layout.run(name))
        sample = _samples(bundle, subjects, request)
        write_record(folder / layout.SAMPLE, sample)
        runs = {name: other.result for name, other in others.items()}
        return BenchResult({**runs, request.run: run.without_samples}, sample)

    done = bundle.stages.get(layout.BENCH)
    bundle.run(
        BENCH,
        produce,
        options=options,
        inputs=inputs,
        # Another set of runs is no contradiction; options of a run were compared by `check_bench`.
        overwrite=overwrite or (done is not None and done.options.keys() != options.keys()),
    )
    return bundle.result(BENCH).runs[request.run]


def check_bench(
    bundle: Bundle, request: BenchRequest, subjects: Sequence[str], *, overwrite: bool
) -> None:
    """Refuse options that differ from those of a finished run of the same name.

    Raises:
        UsageError: the options differ and `overwrite` is false.
    """
    before = _finished_runs(bundle).get(request.run)
    now = replace(request, subjects=tuple(subjects))
    if before is not None and before.options != now and not overwrite:
        raise UsageError(
            f"{bundle.path}: run {request.run!r} was made with other options: "
            f"{differences(encode(before.options), encode(now))}",
            fix="give the run another name with --run, or repeat it with --overwrite",
        )


def describe(bundle: Bundle) -> Subject:
    """Return the facts about an exported bundle that are known without a run."""
    pruned = bundle.options(PRUNE) if bundle.has(PRUNE) else None
    graph = bundle.stages[layout.ONNX]
    return Subject(
        model=bundle.source.name,
        sha256=bundle.source.sha256,
        pattern=pruned.pattern if pruned else None,
        method=pruned.method if pruned else None,
        dtype=exported_with(bundle).dtype,
        file_bytes=sum(
            file.bytes for name, file in graph.files.items() if name.endswith((".onnx", ".data"))
        ),
        cache_bytes_per_token=_graph_result(bundle).cache_bytes_per_token,
    )


def max_sequence(bundle: Bundle) -> int:
    """Return the maximum sequence length of a bundle's exported graph, in tokens."""
    return _graph_result(bundle).max_sequence


def _graph_result(bundle: Bundle) -> GraphResult:
    return bundle.result(GRAPHS)


@dataclass(frozen=True, slots=True)
class _FinishedRun:
    """A finished run of the stage bench."""

    options: BenchRequest
    inputs: dict[str, dict[str, str]]
    result: Run


def _finished_runs(bundle: Bundle) -> dict[str, _FinishedRun]:
    """Return the runs of the stage bench by name, in the order in which they were measured.

    Empty for a stage written by versions in which runs had no names.
    """
    if not has_named_runs(bundle):
        return {}
    options, inputs = bundle.options(BENCH), bundle.inputs(BENCH)
    return {
        names.plain(name, bundle.path / layout.MANIFEST): _FinishedRun(
            options[name], inputs[name], run
        )
        for name, run in bundle.result(BENCH).runs.items()
    }


def _other_runs(
    bundle: Bundle, finished: Mapping[str, _FinishedRun], name: str
) -> dict[str, _FinishedRun]:
    """Return the runs with other names that measured the bundle's current graph."""
    return {
        other: run
        for other, run in finished.items()
        if other != name and run.inputs[PRUNED] == bundle.graph_sha256
    }


def _samples(bundle: Bundle, subjects: Mapping[str, Bundle], request: BenchRequest) -> Sample:
    """Generate the sample text of each subject, and keep earlier texts for the same prompt."""
    before = bundle.result(BENCH).sample if has_named_runs(bundle) else None
    return Sample(
        request.sample_prompt,
        {
            **(before.texts if before and before.prompt == request.sample_prompt else {}),
            **{
                label: _sample(
                    subject.path,
                    # The dense model's own bundle has its tokenizer only if it was converted.
                    (subject if subject.has(PRUNE) else bundle).path,
                    request,
                )
                for label, subject in subjects.items()
            },
        },
    )


def _sample(bundle: Path, tokenized_by: Path, request: BenchRequest) -> str:
    """Generate the sample text of a bundle's exported model.

    Args:
        bundle: folder of the bundle with the graph.
        tokenized_by: folder of the bundle with the tokenizer.
        request: the sample prompt, and the number of tokens to generate.
    """
    model = tokenized_by / layout.MODEL
    tokenizer = load_tokenizer(model)
    # Encode as the command `generate` does, which needs tokenizer.json; a model without that file
    # can still be measured.
    prompt = (
        open_tokenizer(tokenized_by, verify=False).encode(request.sample_prompt)
        if (tokenized_by / layout.TOKENIZER).is_file()
        else tokenizer(request.sample_prompt)["input_ids"]
    )
    ids = generate(
        # Not verified again: the hashes were compared a moment ago.
        open_engine(bundle, verify=False),
        prompt,
        new_tokens=request.sample_tokens,
        stop=stop_ids(model),
    )
    return str(tokenizer.decode(list(ids)))


def _require_same_model(bundle: Bundle, other: Bundle) -> None:
    def tokenizer(of: Bundle) -> str | None:
        files = of.stages[layout.PRUNE].files if of.has(PRUNE) else {}
        return files[layout.TOKENIZER].sha256 if layout.TOKENIZER in files else None

    for what, own, theirs in (
        ("base model", bundle.source.sha256, other.source.sha256),
        ("tokenizer", tokenizer(bundle), tokenizer(other)),
    ):
        if own != theirs:
            raise UsageError(
                f"{other.path}: made from {other.source.name}, whose {what} is not that of "
                f"{bundle.path}, made from {bundle.source.name}",
                fix="compare bundles of one model, or give --allow-different-models",
            )


def _dense_export(bundle: Bundle, dense: Dense | None, announce: Announce) -> Bundle:
    """Return the dense model's bundle in the cache, with a graph exported like the pruned one.

    Raises:
        InputError: the cache has no such graph, and `dense` is None.
    """
    wanted = exported_with(bundle)
    if dense is not None:
        export_dense(dense, wanted, announce)
        return Bundle.open(dense.folder)
    folder = dense_folder(bundle.source.sha256)
    if (folder / manifest.MANIFEST).exists():
        found = Bundle.open(folder)
        if layout.ONNX in found.stages and exported_with(found) == wanted:
            return found
    raise InputError(
        f"{folder}: the cache has no export of {bundle.source.name}, the dense model of "
        f"{bundle.path}, in {wanted.dtype}",
        fix="name the model with --dense MODEL to export it now, or give another baseline with "
        "--against",
    )
