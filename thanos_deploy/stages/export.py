"""The export stages of a bundle, one for each target.

    onnx           onnx/, the graph that everything else is made from
    onnx-DTYPE, onnx-DTYPE-last    the same for engines, where onnx/ is of another kind
    genai          genai/
    packed         packed/
    triton         triton/
    tensorrt-ARCH, tensorrt-rtx-ARCH      engines/tensorrt-ARCH/, ...

An engine stage needs nothing but the bundle: the folder can be copied to the machine with the GPU
and finished there.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import exporters.genai
import exporters.onnx.graph
import exporters.packed
import exporters.tensorrt.engine
import exporters.tensorrt_rtx
import exporters.triton.repository
import runtime
from exporters.options import EngineRequest, ExportRequest
from runtime.engines import onnxruntime as onnx_runtime
from runtime.engines import tensorrt as tensorrt_runtime
from runtime.sampling import Sampling
from thanos_deploy.bundle import files
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.errors import PlatformError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.measure.latency import Generate
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.prune.result import PRUNE, patterns_of
from thanos_deploy.stages.dense import Dense

ENGINES = ("tensorrt", "tensorrt-rtx")

# To choose between two forms of an engine: a prompt and this many tokens, so often.
_TRIAL_TOKENS, _TRIAL_ROUNDS = 32, 20


def export(
    bundle: Bundle,
    *,
    target: str = "onnx",
    request: ExportRequest | None = None,
    engine: EngineRequest | None = None,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> StageRecord:
    """Export the pruned model to a target, unless that is done.

    Args:
        bundle: with the stage prune finished.
        target: a name from `exporters.names()`.
        request: the graph; None for what the graph that is already there was made with, else the
            defaults. Not for a target of `ENGINES`.
        engine: for a target of `ENGINES`; None for the defaults.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.
    """
    bundle.require("prune", "`thanos-deploy prune`")
    if target == "packed":
        return _packed(bundle, overwrite, announce)
    if target in ENGINES:
        return _engine(bundle, target, engine or EngineRequest(), overwrite, announce)
    made = _pruned_graph(bundle, request or exported_with(bundle), "onnx", overwrite, announce)
    if target == "genai":
        return _genai(bundle, overwrite, announce)
    if target == "triton":
        return _triton(bundle, overwrite, announce)
    return made


def exported_with(bundle: Bundle) -> ExportRequest:
    """What the graph of a bundle was made with; the defaults if there is none."""
    return (
        ExportRequest(**bundle.stages["onnx"].options)
        if "onnx" in bundle.stages
        else ExportRequest()
    )


def graph(
    bundle: Bundle,
    model: Checkpoint,
    patterns: Mapping[str, Pattern],
    inputs: Json,
    request: ExportRequest,
    origin: Mapping[str, str],
    announce: Announce,
    *,
    title: str,
    stage: str = "onnx",
    overwrite: bool,
) -> StageRecord:
    """The ONNX graph of a model, dense or pruned, in a folder that is called like its stage.

    Args:
        bundle: where it goes.
        model: what is exported.
        patterns: what its linear layers are claimed to hold, by full name.
        inputs: hashes of what the stage reads.
        request: how it is exported.
        origin: what the graph's metadata says of where it comes from.
        announce: told of the work.
        title: what the model is called in progress lines.
        stage: "onnx", or as for engines.
        overwrite: redo what was made with other options.
    """

    def produce(folder: Path) -> Json:
        files.require_disk(folder, 4 * model.parameters)
        record = exporters.onnx.graph.export(
            model,
            _subfolder(folder, stage),
            pattern=patterns,
            dtype=request.dtype,
            max_sequence=request.max_sequence,
            logits=request.logits,
            origin=origin,
            on_progress=announce(f"Export the {title} to ONNX and compare it with PyTorch"),
        )
        return {
            "max_sequence": record["max_sequence"],
            "logits": record["logits"],
            "cache_bytes_per_token": record["cache"]["bytes_per_token"],
            "rounding": record["rounding"],
            "parity_limit": record["parity_limit"],
            "parity": record["parity"],
            "weights": len(record["weights"]),
        }

    return bundle.run(stage, produce, options=request.to_json(), inputs=inputs, overwrite=overwrite)


def export_dense(dense: Dense, request: ExportRequest, announce: Announce) -> StageRecord:
    """ONNX of a dense model, in its own bundle."""
    checkpoint = dense.checkpoint(announce)
    with dense.claim() as bundle:
        return graph(
            bundle,
            checkpoint,
            {},
            {},
            request,
            {"method": "none", "model_sha256": dense.source.sha256},
            announce,
            title="dense model",
            overwrite=True,
        )


def engine_graph(
    bundle: Bundle,
    request: EngineRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> str:
    """The stage with the graph that an engine is made from, which is exported now if need be."""
    longest = request.max_sequence or exported_with(bundle).max_sequence
    wanted = ExportRequest(request.dtype, longest, request.logits)
    # The graph of the bundle serves as it is, if it is of the right kind.
    own = f"onnx-{request.dtype}{'-last' if request.logits == 'last' else ''}"
    stage = "onnx" if exported_with(bundle) == wanted else own
    _pruned_graph(bundle, wanted, stage, overwrite, announce)
    return stage


def _claimed(bundle: Bundle) -> dict[str, Pattern]:
    """What linear layers of the pruned model are claimed to hold."""
    # Where rows were left dense on purpose no pattern holds.
    off = bundle.result(PRUNE).layers_off_pattern or ()
    return {name: its for name, its in patterns_of(bundle).items() if name not in off}


def _pruned_graph(
    bundle: Bundle,
    request: ExportRequest,
    stage: str,
    overwrite: bool,
    announce: Announce,
) -> StageRecord:
    return graph(
        bundle,
        Checkpoint.open(bundle.path / "model"),
        _claimed(bundle),
        {"model": bundle.model_sha256},
        request,
        {"method": bundle.options(PRUNE).method, "model_sha256": bundle.model_sha256},
        announce,
        title="pruned model" if stage == "onnx" else f"pruned model in {request.dtype}",
        stage=stage,
        overwrite=overwrite,
    )


def _packed(bundle: Bundle, overwrite: bool, announce: Announce) -> StageRecord:
    patterns = _claimed(bundle)
    exporters.packed.refuse(patterns.values())
    model = Checkpoint.open(bundle.path / "model")

    def produce(folder: Path) -> Json:
        files.require_disk(folder, 2 * model.bytes_in("auto"))
        return exporters.packed.export(
            model,
            _subfolder(folder, "packed"),
            pattern=patterns,
            on_progress=announce("Pack the checkpoint and unpack it again to compare"),
        )

    return bundle.run(
        "packed",
        produce,
        options={},
        inputs={"model": bundle.model_sha256},
        overwrite=overwrite,
    )


def _genai(bundle: Bundle, overwrite: bool, announce: Announce) -> StageRecord:
    def produce(folder: Path) -> Json:
        files.require_disk(folder, _bytes(bundle, "onnx"))
        return exporters.genai.export(
            bundle.path / "onnx",
            bundle.path / "model",
            _subfolder(folder, "genai"),
            on_progress=announce("Write the folder for ORT-GenAI and try it out"),
        )

    return bundle.run(
        "genai",
        produce,
        options={},
        inputs={"model": bundle.model_sha256, "onnx": bundle.graph_sha256},
        overwrite=overwrite,
    )


def _triton(bundle: Bundle, overwrite: bool, announce: Announce) -> StageRecord:
    left_out = dict(_unfit_for_triton(bundle))
    engines = {
        stage: exporters.triton.repository.Engine(
            bundle.path / exporters.tensorrt.engine.ENGINES / stage,
            bundle.path / bundle.source_of(stage),
        )
        for stage, record in bundle.stages.items()
        if record.result.get("target") in ENGINES and stage not in left_out
    }

    def produce(folder: Path) -> Json:
        read = ("onnx", *engines)
        # Twice the graph, where a file cannot have two names.
        files.require_disk(folder, 2 * sum(_bytes(bundle, stage) for stage in read))
        models = exporters.triton.repository.export(
            bundle.path,
            _subfolder(folder, "triton"),
            name=f"{bundle.source.name}-{bundle.options(PRUNE).pattern}",
            engines=engines,
            tensorrt_options=onnx_runtime.tensorrt_build_options(
                json.loads((bundle.path / "onnx" / exporters.onnx.graph.RECORD).read_bytes())
            ),
            text_options={option.name: type(option.default) for option in fields(Sampling)},
            text_model=Path(runtime.__path__[0]) / "triton_model.py",
            on_progress=announce("Write the model repository for Triton"),
        )
        return {"models": models, "left_out": left_out}

    return bundle.run(
        "triton",
        produce,
        options={},
        inputs={
            "model": bundle.model_sha256,
            "onnx": bundle.graph_sha256,
            **{stage: bundle.hashes(stage) for stage in engines},
        },
        overwrite=overwrite,
    )


def _unfit_for_triton(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """The engines that do not go into a repository, and why."""
    for stage, record in bundle.stages.items():
        target = record.result.get("target")
        if target == "tensorrt-rtx":
            yield stage, "Triton has no backend for TensorRT-RTX"
        elif target == "tensorrt" and not bundle.source_is_current(stage):
            source = bundle.source_of(stage)
            yield stage, f"built from another {source}/ than the one that is there"


def _engine(
    bundle: Bundle,
    target: str,
    request: EngineRequest,
    overwrite: bool,
    announce: Announce,
) -> StageRecord:
    source = engine_graph(bundle, request, overwrite=overwrite, announce=announce)
    architectures = _architectures(bundle, target, request)
    name = f"{target}-{'+'.join(architectures)}"
    earlier = (
        bundle.path
        / exporters.tensorrt.engine.ENGINES
        / name
        / exporters.tensorrt.engine.TIMING_CACHE
    )

    def build(folder: Path, form: str) -> Json:
        return exporters.tensorrt.engine.export(
            bundle.path / source,
            folder,
            target=target,
            architectures=architectures,
            batch=request.batch,
            prompt=request.prompt,
            form=form,
            compatibility=request.compatibility,
            timing_cache=earlier if earlier.exists() else None,
            on_progress=announce(f"Build an engine for {target}, linear layers as {form}"),
        )

    def produce(folder: Path) -> Json:
        # The engine, its timing cache and log, and the graph again if it is rewritten.
        files.require_disk(folder, 3 * _bytes(bundle, source))
        destination = _subfolder(folder, f"{exporters.tensorrt.engine.ENGINES}/{name}")
        trials: dict[str, float] = {}
        if request.form != "auto":
            record = build(destination, request.form)
        else:
            driver.require()
            record, trials = _fastest(build, destination)
        return {
            **{key: value for key, value in record.items() if key not in ("layers", "profiles")},
            "trial_seconds": trials,
        }

    return bundle.run(
        name,
        produce,
        options=request.to_json(),
        inputs={"model": bundle.model_sha256, source: bundle.hashes(source)},
        overwrite=overwrite,
    )


def _architectures(bundle: Bundle, target: str, request: EngineRequest) -> tuple[str, ...]:
    if target == "tensorrt-rtx":
        return request.architectures or exporters.tensorrt_rtx.ARCHITECTURES
    try:
        arch = driver.require().arch
    except PlatformError as error:
        raise PlatformError(
            f"{error.message}: TensorRT builds an engine on the GPU that is to run it. Everything "
            f"before that is finished and kept in {bundle.path}",
            fix="copy that folder to a machine with the GPU (it needs nothing else of this one) "
            f"and run `thanos-deploy export {bundle.path.name} --target tensorrt` there; or build "
            "with --target tensorrt-rtx here",
        ) from error
    if request.architectures not in ((), (arch,)):
        raise UsageError(
            f"--sm {','.join(request.architectures)}: TensorRT builds for the GPU of this machine, "
            f"{arch}",
            fix="leave --sm out, or use --target tensorrt-rtx",
        )
    return (arch,)


def _fastest(
    build: Callable[[Path, str], Json], destination: Path
) -> tuple[Json, dict[str, float]]:
    """Build an engine of each form and keep the one that is faster from prompt to last token."""
    records, seconds = {}, {}
    for form in exporters.tensorrt.engine.FORMS:
        folder = _subfolder(destination, form)
        records[form] = build(folder, form)
        engine = tensorrt_runtime.open_folder(folder)
        prefill = records[form]["profiles"][0]
        # With room for the answer, in a model that takes hardly more tokens.
        prompt = min(prefill["sequence"]["usual"], engine.max_sequence - _TRIAL_TOKENS)
        work = Generate(prefill["batch"]["usual"], max(prompt, 1), _TRIAL_TOKENS)
        # The first turn warms up.
        turns = [work.take(engine, turn)["total"][0] for turn in range(1 + _TRIAL_ROUNDS)]
        seconds[form] = statistics.median(turns[1:])
    fastest = min(seconds, key=seconds.__getitem__)
    for path in (destination / fastest).iterdir():
        path.replace(destination / path.name)
    for form in exporters.tensorrt.engine.FORMS:
        shutil.rmtree(destination / form)
    return records[fastest], seconds


def _subfolder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def _bytes(bundle: Bundle, stage: str) -> int:
    return sum(file.bytes for file in bundle.stages[stage].files.values())
