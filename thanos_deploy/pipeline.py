"""The stages of a bundle, from a dense model to a report; each is done once and kept.

    import   a GGUF file or a packed folder is unpacked       (in the cache)
    prune    model/, layers.json
    eval     eval/perplexity.json
    eval-onnx, eval-tasks, eval-tasks-onnx    eval/            (only if asked for)
    onnx     onnx/                                            (of the dense model: in the cache)
    genai    genai/                                           (only if asked for)
    packed   packed/                                          (only if asked for)
    triton   triton/                                          (only if asked for)
    tensorrt-ARCH, tensorrt-rtx-ARCH    engines/              (only if asked for)
    bench    bench/RUN.json for every run, bench/sample.json
    report   report/{index.html,report.md,report.json}, README.md

The dense model that pruned ones are compared with is itself a bundle, in a cache folder named
after its hash, so several runs on one model convert, export and evaluate it once.
"""

import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import exporters.genai
import exporters.packed
import exporters.triton
from runtime import load
from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from thanos_deploy import (
    artifact,
    assignment,
    benchmark,
    checkpoint,
    environment,
    evaluation,
    harness,
    owl,
    preflight,
    sizing,
)
from thanos_deploy import perplexity as quality
from thanos_deploy import prune as pruning
from thanos_deploy import recover as recovering
from thanos_deploy import shrink as shrinking
from thanos_deploy.artifact import Bundle, Json, StageRecord
from thanos_deploy.calibrate import BUILTIN, Text, builtin_text, every_segment, read_text, segments
from thanos_deploy.checkpoint import DTYPES, Checkpoint, convert_gguf, convert_packed, locate
from thanos_deploy.errors import InputError, PlatformError, UsageError
from thanos_deploy.estimate import Estimate, estimate, estimate_cutting
from thanos_deploy.export import ENGINES, export, exported_with, graph
from thanos_deploy.journal import Journal
from thanos_deploy.owl import Outliers
from thanos_deploy.parts import part_bytes
from thanos_deploy.pattern import Pattern, Structured
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.report.write import write_report
from thanos_deploy.requests import (
    BenchRequest,
    EngineRequest,
    EvalRequest,
    ExportRequest,
    PruneRequest,
    TaskRequest,
)
from thanos_deploy.sizing import Losses, Plan
from thanos_deploy.walk import activation_bytes

STAGES = ("prune", "eval", "onnx", "bench", "report")

# What a bundle and the model that it was made from are called where they are compared.
PRUNED = "pruned"
DENSE = "dense"


def dense_folder(sha256: str) -> Path:
    """Where the bundle of the dense model with that hash is."""
    return environment.cache_folder() / sha256[:16]


class Dense:
    """The model that a bundle is made from, and its own bundle in the cache.

    Attributes:
        source: where it comes from.
        folder: its bundle in the cache.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        """Find a model; see `checkpoint.locate` for what it may be and what is raised."""
        self.source = locate(model, revision=revision)
        self.folder = dense_folder(self.source.sha256)
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self, announce: Announce = quietly) -> Checkpoint:
        """The model as a Hugging Face folder; a GGUF file or a packed folder is converted once."""
        if self._checkpoint is None:
            if not self.source.is_ordinary:
                self._convert(announce)
                self._checkpoint = Checkpoint.open(self.folder / "model")
            else:
                self._checkpoint = Checkpoint.open(self.source.path)
        return self._checkpoint

    def _convert(self, announce: Announce) -> None:
        def produce(folder: Path) -> Json:
            progress = announce(f"Convert {self.source.name}")
            progress(0, 1)
            convert = convert_gguf if self.source.kind == "gguf" else convert_packed
            convert(self.source.path, folder / "model")
            progress(1, 1)
            return {}

        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            bundle.run("import", produce, options={}, inputs={}, overwrite=True)

    def evaluate(
        self, request: EvalRequest | TaskRequest, runtime: str, announce: Announce
    ) -> StageRecord:
        """Quality of the dense model; for "onnx" of its graph, which must be there."""
        dense = self.checkpoint(announce)
        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            return _evaluate(
                *(bundle, dense, request, runtime, {}, announce),
                title="dense model",
                overwrite=True,
            )

    def export(self, request: ExportRequest, announce: Announce) -> StageRecord:
        """ONNX of the dense model."""
        dense = self.checkpoint(announce)
        with artifact.claim(self.folder, self.source.to_json(), wait=True) as bundle:
            return graph(
                bundle,
                dense,
                {},
                {},
                request,
                {"method": "none", "model_sha256": self.source.sha256},
                announce,
                title="dense model",
                overwrite=True,
            )


def prune_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    request: PruneRequest,
    announce: Announce = quietly,
    *,
    survey: Journal[Outliers] | None = None,
    journal: Journal[pruning.BlockReport] | None = None,
) -> list[pruning.BlockReport]:
    """Prune a checkpoint as requested, on given calibration tokens; see `prune.prune`.

    Where a walk before decides what each block loses, `survey` is the journal of that.
    """
    return pruning.prune(
        source,
        ids,
        destination,
        pattern=_allocated(source, ids, request, announce, survey),
        method=request.method,
        options=request.resolved_options,
        **request.walk_options,
        calib_forward=DTYPES[request.resolved_forward],
        dtype=DTYPES.get(request.dtype),
        journal=journal,
        on_progress=announce(f"Prune to {request.pattern} with {request.method}"),
    )


def assigned(source: Checkpoint, request: PruneRequest) -> dict[str, Pattern]:
    """What is asked of every linear layer that is to be pruned, by its full name."""
    return assignment.assign(
        source.linears,
        request.pattern,
        include=request.include,
        ignore=request.ignore,
        file=_sparsity_file(request),
    )


def _sparsity_file(request: PruneRequest) -> assignment.SparsityFile | None:
    if request.sparsity_file is None:
        return None
    return assignment.read_file(Path(request.sparsity_file).expanduser())


def _allocated(
    source: Checkpoint,
    ids: Tensor,
    request: PruneRequest,
    announce: Announce,
    journal: Journal[Outliers] | None,
) -> Mapping[str, Pattern]:
    """The pattern of every layer, after a walk through the dense model if that decides it."""
    patterns = assigned(source, request)
    if request.allocation != "owl":
        return patterns
    options = request.owl_options
    outliers = owl.survey(
        source,
        ids,
        patterns,
        threshold=options["threshold"],
        journal=journal,
        on_progress=announce("Count the outliers of each block"),
    )
    family, shapes = source.family, pruning.linear_shapes(source)
    blocks = [
        {
            name: math.prod(shapes[name])
            for linear in family.linears
            if (name := f"{family.blocks}.{index}.{linear}") in patterns
        }
        for index in range(len(outliers))
    ]
    ratios = [block.ratio for block in outliers]
    return owl.allocate(ratios, blocks, request.pattern.sparsity, spread=options["spread"])


def survey_blocks(
    source: Checkpoint,
    ids: Tensor,
    request: PruneRequest,
    announce: Announce = quietly,
    *,
    journal: Journal[Losses] | None = None,
) -> list[Losses]:
    """What each block would lose at which widths; the same for every fraction to remove."""
    fit = request.fit_options
    return shrinking.survey(
        source,
        ids,
        multiple=request.ffn_multiple,
        damping=fit["damping"],
        damping_mode=fit["damping_mode"],
        journal=journal,
        on_progress=announce("Find out what each block would lose"),
    )


def plan_widths(source: Checkpoint, losses: Sequence[Losses], request: PruneRequest) -> Plan:
    """How wide the blocks of a shrunk model will be."""
    return sizing.plan(source, losses, request.pattern.sparsity, **request.sizing_options)


def shrink_checkpoint(
    source: Checkpoint,
    ids: Tensor,
    destination: Path,
    request: PruneRequest,
    plan: Plan,
    announce: Announce = quietly,
    *,
    journal: Journal[shrinking.BlockReport] | None = None,
) -> list[shrinking.BlockReport]:
    """Cut heads and channels out of a checkpoint as planned; see `shrink.shrink`."""
    return shrinking.shrink(
        source,
        ids,
        destination,
        plan=plan,
        **request.fit_options,
        dtype=DTYPES.get(request.dtype),
        journal=journal,
        on_progress=announce(f"Cut {plan.removed:.1%} out of the blocks and refit the rest"),
    )


def recover_checkpoint(
    source: Checkpoint,
    text: Text,
    folder: Path,
    request: PruneRequest,
    announce: Announce = quietly,
) -> recovering.Recovery:
    """Train the pruned model in a folder, in place of itself, on any part of a text."""
    tokenizer = checkpoint.load_tokenizer(source.folder)
    trained = folder.with_name(f"{folder.name}-trained")
    trained.mkdir()
    recovery = recovering.recover(
        *(Checkpoint.open(folder), source),
        every_segment(text, tokenizer, length=request.seqlen),
        trained,
        count=request.recover,
        seed=request.seed,
        on_progress=announce(f"Train what is left on {request.recover} segments"),
    )
    shutil.rmtree(folder)
    trained.rename(folder)
    return recovery


def prune(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Prune the model into the bundle, unless that is done."""
    source = dense.checkpoint(announce)
    _refuse_pruning(source, request)
    own = _sparsity_file(request)
    text = _text(request.calib, request.text_field, held_out=False)
    ids = _segments(source, text, request.nsamples, request.seqlen, seed=request.seed)

    inputs = {
        "model": dense.source.sha256,
        "text": text.sha256,
        **({} if own is None else {"sparsity_file": own.sha256}),
    }
    owner = {**request.to_json(), **inputs, **_versions()}

    def produce(folder: Path) -> Json:
        (folder / "model").mkdir()
        kept = bundle.journal("prune")
        activations = activation_bytes(
            *(source, ids.numel(), DTYPES[request.resolved_forward]),
            with_dense=request.walks_dense,
        )
        if request.surveys:
            activations += activation_bytes(source, ids.numel(), torch.float32, with_dense=False)
        needed = 2 * source.bytes_in(request.dtype) + activations  # the model, and its journals
        artifact.require_disk(folder, needed - artifact.size(kept))
        blocks: Sequence[pruning.BlockReport | shrinking.BlockReport]
        surveyed: Journal[Losses] | Journal[Outliers] | None
        if request.shrinks:
            surveyed = Journal(kept / "survey", owner, Losses)
            losses = survey_blocks(source, ids, request, announce, journal=surveyed)
            plan = plan_widths(source, losses, request)
            cut = Journal(kept / "blocks", owner, shrinking.BlockReport)
            blocks = shrink_checkpoint(
                *(source, ids, folder / "model", request, plan, announce), journal=cut
            )
            summary = {**_summary_of_cuts(blocks), "widths": _plan_summary(plan)}
        else:
            surveyed = Journal(kept / "survey", owner, Outliers) if request.surveys else None
            pruned = Journal(kept / "blocks", owner, pruning.BlockReport)
            blocks = prune_checkpoint(
                *(source, ids, folder / "model", request, announce), survey=surveyed, journal=pruned
            )
            summary = _summary_of(blocks, request)
        artifact.write_json(folder / assignment.LAYERS, [asdict(block) for block in blocks])
        if request.recover:
            summary["recovery"] = asdict(
                recover_checkpoint(source, text, folder / "model", request, announce)
            )
        return {
            **summary,
            **(
                {"survey_seconds": sum(sum(one.seconds.values()) for one in surveyed.reports)}
                if surveyed
                else {}
            ),
            **{
                f"{activity}_seconds": sum(block.seconds.get(activity, 0.0) for block in blocks)
                for activity in ("collect", "solve", "tune", "forward", "journal")
            },
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "dense_bytes": source.bytes_in("auto"),
            "parts": {
                "dense": part_bytes(source),
                "pruned": part_bytes(Checkpoint.open(folder / "model")),
            },
        }

    return bundle.run(
        "prune",
        produce,
        options=request.to_json(),
        inputs=inputs,
        overwrite=overwrite,
    )


def _versions() -> Json:
    """What else the last bit of a result depends on: the code and the number of threads."""
    made_with = environment.describe()
    return {
        "thanos-deploy": made_with["thanos-deploy"],
        "libraries": made_with["libraries"],
        "processor": made_with["processor"],
        "threads": torch.get_num_threads(),
    }


def evaluate(
    bundle: Bundle,
    dense: Dense,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Measure the quality of the dense and the pruned model, unless that is done.

    Args:
        bundle: with the stage prune finished; for "onnx" with the stage onnx too.
        dense: the model that it was made from.
        request: perplexity on a text, or tasks.
        runtime: one of `evaluation.RUNTIMES`. For "onnx" the dense model is exported like the
            bundle's own graph.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.
    """
    pruned = bundle.require("prune", "`thanos-deploy prune`")
    if runtime == "onnx":
        bundle.require("onnx", f"`thanos-deploy export {bundle.path} --target onnx`")
    bundle.check(evaluation.stage(request, runtime), request.to_json(), overwrite=overwrite)
    _require_judge(request, pruned.inputs["text"])
    if runtime == "onnx":
        dense.export(exported_with(bundle), announce)
    reference = dense.evaluate(request, runtime, announce)
    return _evaluate(
        *(bundle, Checkpoint.open(bundle.path / "model"), request, runtime),
        {"model": bundle.model_sha256, "dense": reference.result},
        announce,
        title="pruned model",
        overwrite=overwrite,
    )


def evaluate_alone(
    model: str,
    request: EvalRequest | TaskRequest,
    *,
    runtime: str = "torch",
    announce: Announce = quietly,
) -> Json:
    """Measure the quality of one model, or of a bundle's pruned one, beside nothing else.

    Of a bundle nothing is kept: what it keeps is beside the dense model; see `evaluate`.
    """
    folder = Path(model)
    if (folder / artifact.MANIFEST).exists():
        bundle = Bundle.open(folder)
        pruned = bundle.require("prune", "`thanos-deploy prune`")
        _require_judge(request, pruned.inputs["text"])
        checked = Checkpoint.open(folder / "model")
        return _measure(bundle, checked, request, runtime, announce, title="pruned model")
    _require_judge(request, None)
    alone = Dense(model)
    if runtime == "onnx":
        alone.export(ExportRequest(), announce)
    return alone.evaluate(request, runtime, announce).result


def compared(
    bundle: Bundle,
    against: Sequence[str],
    dense: Dense | None,
    *,
    different_models: bool = False,
    announce: Announce = quietly,
) -> dict[str, Bundle]:
    """A bundle, called pruned, and what it is compared with; the first of these is the baseline.

    Args:
        bundle: with the stage onnx finished.
        against: "dense" for the model that the bundle was made from, else folders of bundles.
        dense: that model; None for what the cache has of it.
        different_models: allow bundles of another base model or with another tokenizer.
        announce: told of every piece of work.

    Returns:
        bundles by label, the baseline first; a further bundle is called like its folder.

    Raises:
        InputError: a bundle is not there, or its graph, or the dense model's.
        UsageError: a bundle is compared with itself, two have one name, or their models differ.
    """
    others: dict[str, Bundle] = {}
    for name in against:
        other = bundle if name == DENSE else Bundle.open(Path(name))
        label = name if name == DENSE else other.path.resolve().name
        itself = name != DENSE and (label == DENSE or other.path.samefile(bundle.path))
        if itself or label in (PRUNED, *others):
            raise UsageError(
                f"--against {name}: two of the models would be the same, or be called {label!r}",
                fix="name each bundle once, in a folder of its own name; --aa compares a bundle "
                "with itself",
            )
        other.require("onnx", f"`thanos-deploy export {other.path} --target onnx`")
        if not different_models:
            _require_same_model(bundle, other)
        others[label] = other
    if DENSE in others:  # the last to be looked at, because its export takes minutes
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
) -> Json:
    """Measure exported models in turns and keep the run in a bundle, unless that is done.

    Args:
        bundle: keeps the run, beside its runs of other names.
        subjects: `compared`, or the bundle alone under several names.
        request: what to measure.
        overwrite: redo a run of that name that was made with other options.
        announce: told of every piece of work.

    Returns:
        the run without its raw samples; see `benchmark.measure`.

    Raises:
        UsageError: the models do not take the request, or a run of that name was made with other
            options, and not `overwrite`.
        PlatformError: the driver of the load is not installed.
        KeyboardInterrupt: the rounds that were complete are in `bench/RUN.interrupted.json`.
    """
    request.check(min(one.stages["onnx"].result["max_sequence"] for one in subjects.values()))
    if request.driver == "loadgen":
        load.loadgen_library()
    check_bench(bundle, request, list(subjects), overwrite=overwrite)
    others = _other_runs(bundle, request.run)
    graphs = {label: subject.graph_sha256 for label, subject in subjects.items()}
    options = {
        **{name: run.options for name, run in others.items()},
        request.run: _bench_options(request, list(subjects)),
    }

    def produce(folder: Path) -> Json:
        out = folder / "bench"
        out.mkdir()
        run = benchmark.measure(
            subjects,
            request,
            same=len({subject.path for subject in subjects.values()}) == 1,
            on_progress=announce("Measure latency and memory in turns"),
        )
        if run["status"] == "INTERRUPTED":
            (bundle.path / "bench").mkdir(exist_ok=True)
            artifact.write_json(bundle.path / "bench" / f"{request.run}.interrupted.json", run)
            raise KeyboardInterrupt
        artifact.write_json(out / f"{request.run}.json", run)
        for name in others:
            bundle.verify_file(f"bench/{name}.json")
            shutil.copy(bundle.path / "bench" / f"{name}.json", out)
        sample = _samples(bundle, subjects, request)
        artifact.write_json(out / "sample.json", sample)
        runs = {name: other.result for name, other in others.items()}
        return {
            "runs": {**runs, request.run: benchmark.without_samples(run)},
            "sample": sample,
        }

    before = bundle.stages.get("bench")
    record = bundle.run(
        "bench",
        produce,
        options=options,
        inputs={**{name: run.inputs for name, run in others.items()}, request.run: graphs},
        # A run more or less is no contradiction.
        overwrite=overwrite or (before is not None and before.options.keys() != options.keys()),
    )
    run: Json = record.result["runs"][request.run]
    return run


def check_bench(
    bundle: Bundle, request: BenchRequest, subjects: Sequence[str], *, overwrite: bool
) -> None:
    """Refuse options that differ from those of a finished run of the same name.

    Raises:
        UsageError: they differ and may not be overwritten.
    """
    before = _finished_runs(bundle).get(request.run)
    now = _bench_options(request, subjects)
    if before is not None and before.options != now and not overwrite:
        raise UsageError(
            f"{bundle.path}: run {request.run!r} was made with other options: "
            f"{artifact.differences(before.options, now)}",
            fix="give it another name with --run, or --overwrite to redo it",
        )


def perplexities(bundle: Bundle, subjects: Mapping[str, Bundle]) -> dict[str, float]:
    """Perplexity by label, as far as it is known on the text that the bundle was judged on."""
    own = bundle.stages.get("eval")
    if own is None:
        return {}
    found = {
        label: subject.stages["eval"].result["value"]
        for label, subject in subjects.items()
        if "eval" in subject.stages
        and subject.stages["eval"].options == own.options
        and subject.stages["eval"].inputs["text"] == own.inputs["text"]
    }
    return found


@contextmanager
def reopen(out: Path, model: str) -> Iterator[tuple[Bundle, Dense]]:
    """A bundle for further stages, and the dense model that it was made from.

    Raises:
        InputError: there is no bundle.
        UsageError: it was made from another model.
        ResourceError: another process is writing there.
    """
    Bundle.open(out)  # claiming would create one
    dense = Dense(model)
    with artifact.claim(out, dense.source.to_json()) as bundle:
        yield bundle, dense


def prune_export(
    model: str,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    target: str = "onnx",
    engine: EngineRequest | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Json:
    """Every stage, from a dense model to its report. Repeating the call continues or confirms it.

    Raises:
        DeployError: of any kind; everything that can be refused beforehand is.
    """
    dense = Dense(model, revision=revision)
    if target == "genai":
        exporters.genai.library()
    if target == "triton":
        exporters.triton.library()
    if target == "packed":
        exporters.packed.refuse([request.pattern])
    if target == "tensorrt-rtx":
        preflight.require(target)
    with artifact.claim(out, dense.source.to_json(), overwrite=overwrite) as bundle:
        _refuse_beforehand(bundle, dense, request, evaluation, benchmarking, overwrite, announce)
        prune(bundle, dense, request, overwrite=overwrite, announce=announce)
        evaluate(bundle, dense, evaluation, overwrite=overwrite, announce=announce)
        lacking: PlatformError | None = None
        for wanted in dict.fromkeys(("onnx", target)):  # the graph is measured in any case
            try:
                export(bundle, target=wanted, engine=engine, overwrite=overwrite, announce=announce)
            except PlatformError as error:
                if wanted not in ENGINES:
                    raise
                lacking = error  # the rest does not need the engine, and is not to be lost
        subjects = compared(bundle, [DENSE], dense, announce=announce)
        bench(bundle, subjects, benchmarking, overwrite=overwrite, announce=announce)
        finished = write_report(bundle)
        if lacking is not None:
            raise lacking
        return finished


def plan(
    model: str,
    out: Path,
    *,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    revision: str | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Json:
    """What `prune_export` would do, and whether it would be refused; writes nothing to `out`."""
    dense = Dense(model, revision=revision)
    bundle = (
        Bundle.open(out)
        if (out / artifact.MANIFEST).exists()
        else Bundle(out, dense.source.to_json())
    )
    _refuse_beforehand(bundle, dense, request, evaluation, benchmarking, overwrite, announce)
    parameters = dense.checkpoint(announce).parameters
    return {
        **_plan_pruning(dense, request, out, announce, evaluation),
        "eval": evaluation.to_json(),
        "bench": benchmarking.to_json(),
        "stages": {name: "done" if name in bundle.stages else "to do" for name in STAGES},
        "cache": str(dense.folder),
        "cache_bytes_needed": (4 if dense.source.is_ordinary else 8) * parameters,
    }


def outline(model: str, *, revision: str | None, announce: Announce) -> Checkpoint:
    """The sizes of a model, from its configuration alone; only a GGUF file is converted first."""
    folder = checkpoint.locate_configuration(model, revision=revision)
    if folder is None:
        return Dense(model).checkpoint(announce)
    return Checkpoint.outline(folder)


def plan_prune(
    model: str,
    out: Path,
    request: PruneRequest,
    *,
    revision: str | None = None,
    announce: Announce = quietly,
) -> Json:
    """What `prune` would do, and whether it would be refused; writes nothing to `out`.

    For a model that is to be shrunk this includes the widths of every block and the loss that is
    predicted for them, from a walk through the dense model.
    """
    dense = Dense(model, revision=revision)
    _refuse_pruning(dense.checkpoint(announce), request)
    return _plan_pruning(dense, request, out, announce)


def _plan_pruning(
    dense: Dense,
    request: PruneRequest,
    out: Path,
    announce: Announce,
    evaluation: EvalRequest | None = None,
) -> Json:
    """What would be pruned, and what that takes; with an evaluation the stages after it as well."""
    source = dense.checkpoint(announce)
    entries = {name: math.prod(shape) for name, shape in pruning.linear_shapes(source).items()}
    text = _text(request.calib, request.text_field, held_out=False)
    ids = _segments(source, text, request.nsamples, request.seqlen, seed=request.seed)
    exported = 0 if evaluation is None else 4 * source.parameters
    what: Json
    if request.shrinks:
        losses = survey_blocks(source, ids, request, announce)
        widths = plan_widths(source, losses, request)
        found = estimate_cutting(source, ids, request, losses, widths)
        what = {"widths": _plan_summary(widths)}
    else:
        patterns = assigned(source, request)
        found = estimate(source, ids, request, patterns)
        what = {
            "patterns": assignment.counts(patterns.get(name) for name in entries),
            "layers_left_dense": [name for name in entries if name not in patterns],
            "linear_weights_removed": sum(
                int(entries[name] * its.sparsity) for name, its in patterns.items()
            ),
        }
    return {
        "model": dense.source.to_json(),
        "model_type": source.config.model_type,
        "parameters": source.parameters,
        "linear_layers": len(entries),
        "linear_weights": sum(entries.values()),
        "prune": request.to_json(),
        "disk_bytes_needed": source.bytes_in(request.dtype) + exported,
        "disk_bytes_free": shutil.disk_usage(_existing(out)).free,
        **what,
        "estimate": _estimated(source, found, request, evaluation),
    }


def _estimated(
    source: Checkpoint, found: Estimate, request: PruneRequest, evaluation: EvalRequest | None
) -> Json:
    seconds = dict(found.seconds)
    if evaluation is not None:
        # The dense and the pruned model; the output head is as much work as its share of weights.
        blocks = source.config.num_hidden_layers
        weights = sum(math.prod(shape) for shape in pruning.linear_shapes(source).values())
        head = source.config.vocab_size * source.config.hidden_size * blocks / weights
        tokens = 2 * evaluation.segments * evaluation.seqlen
        seconds["eval"] = tokens * found.token_seconds * (blocks + head)
    return {
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "memory_bytes": found.memory_bytes,
        "basis": found.basis,
        "not_estimated": [
            *(["recover"] if request.recover else []),
            *([] if evaluation is None else ["onnx", "bench"]),
        ],
    }


def _refuse_beforehand(
    bundle: Bundle,
    dense: Dense,
    request: PruneRequest,
    evaluation: EvalRequest,
    benchmarking: BenchRequest,
    overwrite: bool,
    announce: Announce,
) -> None:
    """Raise now what a later stage would raise after minutes of work."""
    for stage, options in (
        ("prune", request.to_json()),
        ("eval", evaluation.to_json()),
    ):
        bundle.check(stage, options, overwrite=overwrite)
    check_bench(bundle, benchmarking, [DENSE, PRUNED], overwrite=overwrite)
    source = dense.checkpoint(announce)
    _refuse_pruning(source, request)
    benchmarking.check(source.max_positions)
    calibration = _text(request.calib, request.text_field, held_out=False)
    _segments(source, calibration, request.nsamples, request.seqlen, seed=request.seed)
    text = _text(evaluation.text, evaluation.text_field, held_out=True)
    _segments(source, text, evaluation.segments, evaluation.seqlen, seed=None)
    _require_other_text(text, calibration.sha256)


def _refuse_pruning(source: Checkpoint, request: PruneRequest) -> None:
    """Raise what pruning would raise, as far as configuration and headers show it."""
    request.check()
    if request.shrinks:
        shrinking.check(source)
        sizing.check(source, request.pattern.sparsity, **request.sizing_options)
    else:
        patterns = assigned(source, request)
        columns = [name for name, its in patterns.items() if isinstance(its, Structured)]
        if columns and not request.keep_shape:
            raise UsageError(
                f"{request.sparsity_file}: {columns[0]} is {patterns[columns[0]]}, which is no "
                "pattern of one layer: heads and channels go from every layer that makes or reads "
                "them",
                fix="use n:m or unstructured:FRACTION for it; or --pattern structured:FRACTION "
                "with --keep-shape, for columns of zeros",
            )
        pruning.check(
            source, pattern=patterns, method=request.method, options=request.resolved_options
        )


def _require_judge(request: EvalRequest | TaskRequest, calibration_sha256: str | None) -> None:
    """Refuse what quality cannot be judged by, before anything takes time."""
    if isinstance(request, TaskRequest):
        harness.require(request)
    else:
        text = _text(request.text, request.text_field, held_out=True)
        _require_other_text(text, calibration_sha256)


def _evaluate(
    bundle: Bundle,
    model: Checkpoint,
    request: EvalRequest | TaskRequest,
    runtime: str,
    inputs: Json,
    announce: Announce,
    *,
    title: str,
    overwrite: bool,
) -> StageRecord:
    def produce(folder: Path) -> Json:
        result = _measure(bundle, model, request, runtime, announce, title=title)
        (folder / "eval").mkdir()
        artifact.write_json(folder / evaluation.file(request, runtime), {**result, **inputs})
        return result

    judge = (
        request.files
        if isinstance(request, TaskRequest)
        else _text(request.text, request.text_field, held_out=True).sha256
    )
    return bundle.run(
        evaluation.stage(request, runtime),
        produce,
        options=request.to_json(),
        inputs={
            **inputs,
            "text" if isinstance(request, EvalRequest) else "tasks": judge,
            **({"onnx": bundle.graph_sha256} if runtime == "onnx" else {}),
        },
        overwrite=overwrite,
    )


def _measure(
    bundle: Bundle,
    model: Checkpoint,
    request: EvalRequest | TaskRequest,
    runtime: str,
    announce: Announce,
    *,
    title: str,
) -> Json:
    """Perplexity or scores of a checkpoint, or of the graph in its bundle."""
    if isinstance(request, TaskRequest):
        # The library shows bars of its own.
        scores = harness.score(bundle.path, model, request, runtime)
        return {"scores": [asdict(score) for score in scores]}
    text = _text(request.text, request.text_field, held_out=True)
    ids = _segments(model, text, request.segments, request.seqlen, seed=None)
    where = "" if runtime == "torch" else "'s ONNX graph"
    progress = announce(f"Perplexity of the {title}{where}")
    read = evaluation.open_reader(bundle.path, model, runtime)
    measured = quality.perplexity_of(read, ids, on_progress=progress)
    return {"text": text.origin, **asdict(measured)}


def _bench_options(request: BenchRequest, subjects: Sequence[str]) -> Json:
    return {**request.to_json(), "subjects": list(subjects)}


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run of the stage bench."""

    options: Json
    inputs: Json
    result: Json


def _finished_runs(bundle: Bundle) -> dict[str, _Run]:
    """The runs of the stage bench, in the order in which they were measured.

    There is none in a stage that is from before runs had names.
    """
    done = bundle.stages.get("bench")
    if done is None:
        return {}
    return {
        name: _Run(done.options[name], done.inputs[name], result)
        for name, result in done.result.get("runs", {}).items()
    }


def _other_runs(bundle: Bundle, name: str) -> dict[str, _Run]:
    """The runs of other names that are of the graph that the bundle has now."""
    return {
        other: run
        for other, run in _finished_runs(bundle).items()
        if other != name and run.inputs[PRUNED] == bundle.graph_sha256
    }


def _samples(bundle: Bundle, subjects: Mapping[str, Bundle], request: BenchRequest) -> Json:
    """What the subjects make of the sample prompt, beside what others made of it before."""
    done = bundle.stages.get("bench")
    before = done.result["sample"] if done else {}
    return {
        **(before if before.get("prompt") == request.sample_prompt else {}),
        "prompt": request.sample_prompt,
        **{
            label: _sample(
                subject.path,
                # The cache has the dense model's files only where it converted them.
                (subject if "prune" in subject.stages else bundle).path / "model",
                request,
            )
            for label, subject in subjects.items()
        },
    }


def _require_same_model(bundle: Bundle, other: Bundle) -> None:
    def tokenizer(of: Bundle) -> str | None:
        files = of.stages["prune"].files if "prune" in of.stages else {}
        return files["model/tokenizer.json"].sha256 if "model/tokenizer.json" in files else None

    for what, own, theirs in (
        ("base model", bundle.source["sha256"], other.source["sha256"]),
        ("tokenizer", tokenizer(bundle), tokenizer(other)),
    ):
        if own != theirs:
            raise UsageError(
                f"{other.path}: made from {other.source['name']}, whose {what} is not that of "
                f"{bundle.path}, made from {bundle.source['name']}",
                fix="compare bundles of one model, or give --allow-different-models",
            )


def _dense_export(bundle: Bundle, dense: Dense | None, announce: Announce) -> Bundle:
    """The dense model's bundle, exported like a pruned one."""
    wanted = exported_with(bundle)
    if dense is not None:
        dense.export(wanted, announce)
        return Bundle.open(dense.folder)
    folder = dense_folder(bundle.source["sha256"])
    if (folder / artifact.MANIFEST).exists():
        found = Bundle.open(folder)
        if "onnx" in found.stages and found.stages["onnx"].options == asdict(wanted):
            return found
    raise InputError(
        f"{folder}: no export of {bundle.source['name']} there, the dense model of {bundle.path}, "
        f"in {wanted.dtype}",
        fix="name the model with --dense MODEL to export it now, or give another baseline with "
        "--against",
    )


def _text(name: str, text_field: str, *, held_out: bool) -> Text:
    if name == BUILTIN:
        return builtin_text(held_out=held_out)
    return read_text(Path(name).expanduser(), text_field=text_field)


def _require_other_text(text: Text, calibration_sha256: str | None) -> None:
    if text.sha256 == calibration_sha256:
        raise UsageError(
            f"{text.origin}: the model is pruned on this very text, so its perplexity there "
            "says nothing",
            fix="give another text with --eval-text",
        )


def _segments(
    source: Checkpoint, text: Text, count: int, length: int, *, seed: int | None
) -> Tensor:
    if not 2 <= length <= source.max_positions or count < 1:
        raise UsageError(
            f"{count} segments of {length} tokens; the model takes 2 to {source.max_positions} "
            "tokens at once",
            fix="use at least one segment, of a length that the model takes",
        )
    tokenizer = checkpoint.load_tokenizer(source.folder)
    return segments(text, tokenizer, count=count, length=length, seed=seed)


def _sample(bundle: Path, model: Path, request: BenchRequest) -> str:
    """What the exported model of a bundle makes of the sample prompt."""
    tokenizer = checkpoint.load_tokenizer(model)
    prompt = tokenizer(request.sample_prompt, add_special_tokens=False)["input_ids"]
    ids = generate(
        # The hashes have just been compared.
        open_engine(bundle, verify=False),
        prompt,
        new_tokens=request.sample_tokens,
        stop=stop_ids(model),
    )
    return str(tokenizer.decode(list(ids)))


def _summary_of(blocks: list[pruning.BlockReport], request: PruneRequest) -> Json:
    layers = [layer for block in blocks for layer in block.layers]
    patterns = assignment.recorded([asdict(block) for block in blocks], request.pattern)
    pruned = [layer for layer in layers if layer.name in patterns]
    worst = max(pruned, key=lambda layer: layer.relative_error)
    weights = sum(layer.rows * layer.cols for layer in layers)
    damping = float(request.resolved_options.get("damping", 0.0))
    return {
        "layers": len(layers),
        "weights": weights,
        "sparsity": sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / weights,
        "patterns": assignment.counts(patterns.get(layer.name) for layer in layers),
        "layers_left_dense": [layer.name for layer in layers if layer.name not in patterns],
        "pattern_holds": all(layer.pattern_holds for layer in pruned),
        "layers_off_pattern": [layer.name for layer in pruned if not layer.pattern_holds],
        "retries": [
            {
                "layer": layer.name,
                "solver": layer.solver,
                "damping": layer.damping,
                "failures": list(layer.failures),
            }
            for layer in pruned
            if layer.failures or layer.damping > damping
        ],
        "median_relative_error": statistics.median(layer.relative_error for layer in pruned),
        "worst_relative_error": worst.relative_error,
        "worst_layer": worst.name,
        "largest_damping": max(layer.damping for layer in pruned),
    }


def _summary_of_cuts(blocks: list[shrinking.BlockReport]) -> Json:
    errors = {
        f"block {index}, {part}": error
        for index, block in enumerate(blocks)
        for part, error in (("heads", block.heads_error), ("ffn", block.channels_error))
    }
    worst = max(errors, key=errors.__getitem__)
    return {
        "median_relative_error": statistics.median(errors.values()),
        "worst_relative_error": errors[worst],
        "worst_layer": worst,
        "largest_damping": max(block.damping for block in blocks),
    }


def _plan_summary(plan: Plan) -> Json:
    """For people and for the manifest: one row a block, and what they come to."""
    return {
        "removed": plan.removed,
        "stock_config": plan.stock,
        "block_parameters_before": sum(block.parameters_before for block in plan.blocks),
        "block_parameters_after": sum(block.parameters_after for block in plan.blocks),
        "predicted_loss": sum(block.predicted_loss for block in plan.blocks) / len(plan.blocks),
        "blocks": [asdict(block) for block in plan.blocks],
    }


def _existing(path: Path) -> Path:
    """The path itself or the nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
