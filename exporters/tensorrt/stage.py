"""An engine as a stage of its bundle: export it, and verify it later."""

import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from exporters.onnx.stage import export_pruned
from exporters.options import EngineRequest, ExportRequest, neutral_like
from exporters.target import stage_bytes, write_stage
from exporters.tensorrt import engine
from exporters.tensorrt.library import Library
from runtime.engines import tensorrt as tensorrt_runtime
from thanos_deploy.bundle.engine_record import BuildRecord, EngineResult, Summary, read_build
from thanos_deploy.bundle.layout import GRAPH, ONNX, TIMING_CACHE, engine_folder
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.check import Check
from thanos_deploy.gpu import driver
from thanos_deploy.measure.latency import Generate
from thanos_deploy.progress import Announce, quietly

# A trial of a form of the linear layers: generate this many tokens, this many times.
_TRIAL_TOKENS, _TRIAL_ROUNDS = 32, 20

_REBUILD = "build the engine again with `thanos-deploy export --overwrite`"


def export(
    bundle: Bundle,
    request: EngineRequest,
    *,
    library: Library,
    architectures: Callable[[], tuple[str, ...]],
    overwrite: bool,
    announce: Announce,
) -> Exported[EngineResult]:
    """Export the graph of the pruned model if need be, and build an engine from it.

    Args:
        bundle: a bundle whose stage prune is finished, claimed for writing.
        request: options of the engine.
        library: the library that builds it.
        architectures: returns the GPUs to build for, or raises; called after the graph is exported.
        overwrite: redo stages that were made with other options.
        announce: called with the title of every task that starts.

    Raises:
        DeployError: see `exporters.tensorrt.engine.export`; PlatformError also if the form is
            "auto" and there is no GPU.
    """
    source = export_graph(bundle, request, overwrite=overwrite, announce=announce)
    for_gpus = architectures()
    name = f"{library.target}-{'+'.join(for_gpus)}"
    folder = engine_folder(name)
    earlier = bundle.path / folder / TIMING_CACHE

    def build(folder: Path, form: str) -> BuildRecord:
        return engine.export(
            bundle.path / source,
            folder,
            library=library,
            architectures=for_gpus,
            batch=request.batch,
            prompt=request.prompt,
            form=form,
            compatibility=request.compatibility,
            timing_cache=earlier if earlier.exists() else None,
            on_progress=announce(f"Build an engine for {library.target}, linear layers as {form}"),
        )

    def write(destination: Path) -> EngineResult:
        if request.form != "auto":
            return build(destination, request.form).result({})
        driver.require()
        return _fastest(build, destination)

    return write_stage(
        bundle,
        name,
        write,
        result=EngineResult,
        folder=folder,
        inputs={"model": bundle.model_sha256, source: bundle.hashes(source)},
        # The engine, its timing cache and log, and a copy of the graph if it is rewritten.
        bytes_needed=lambda: 3 * stage_bytes(bundle, source),
        options=request,
        overwrite=overwrite,
    )


def export_graph(
    bundle: Bundle,
    request: EngineRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> str:
    """Return the stage with the graph that an engine is built from; export it if need be."""
    own = neutral_like(bundle)
    wanted = ExportRequest(request.dtype, request.max_sequence or own.max_sequence, request.logits)
    # The bundle's own graph is used if it was made with the same options.
    last = "-last" if request.logits == "last" else ""
    stage = ONNX if own == wanted else f"{ONNX}-{request.dtype}{last}"
    export_pruned(bundle, wanted, stage=stage, overwrite=overwrite, announce=announce)
    return stage


def verify(bundle: Bundle, stage: str, *, library: Library) -> Iterator[Check]:
    """Check that an engine is built from the current graph, and that its log gives its verdicts."""
    folder = bundle.path / engine_folder(stage)
    source = bundle.source_of(stage)
    yield _source(bundle, stage, source)
    name = f"{stage}: sparse kernels"
    build = read_build(folder)
    graph = folder if (folder / GRAPH).exists() else bundle.path / source
    weights = engine.read_weights(graph / GRAPH, [layer.name for layer in build.layers])
    engine_layers, layers = engine.proof_of(
        folder, weights, sparse=build.sparse_weights, library=library
    )
    recorded = (build.engine_layers, build.layers, build.summary)
    if recorded != (engine_layers, layers, Summary.of(layers)):
        yield Check(
            name,
            "FAIL",
            "the recorded verdicts differ from those that follow from the engine's log and graph",
            fix=_REBUILD,
        )
        return
    reasons = Counter(f"{layer.verdict}: {layer.reason}" for layer in layers)
    most, count = reasons.most_common(1)[0]
    silent = all(layer.verdict == "not reported" for layer in layers)
    yield Check(name, "SKIP" if silent else "PASS", f"{build.summary}; {count} {most}")


def _source(bundle: Bundle, stage: str, source: str) -> Check:
    name = f"{stage}: graph"
    if bundle.source_is_current(stage):
        return Check(name, "PASS", f"built from the current {source}/")
    return Check(
        name, "FAIL", f"built from an earlier {source}/, not from the current one", fix=_REBUILD
    )


def _fastest(build: Callable[[Path, str], BuildRecord], destination: Path) -> EngineResult:
    """Build an engine of each form, and keep the one that generates a whole answer faster."""
    records, seconds = {}, {}
    for form in engine.FORMS:
        folder = destination / form
        folder.mkdir()
        records[form] = build(folder, form)
        loaded = tensorrt_runtime.open_folder(folder)
        prefill = records[form].profiles[0]
        # Leave room for the answer, even if the model takes hardly more tokens.
        prompt = min(prefill.sequence.usual, loaded.max_sequence - _TRIAL_TOKENS)
        work = Generate(prefill.batch.usual, max(prompt, 1), _TRIAL_TOKENS)
        # The first turn is a warm-up.
        turns = [work.take(loaded, turn)["total"][0] for turn in range(1 + _TRIAL_ROUNDS)]
        seconds[form] = statistics.median(turns[1:])
    fastest = min(seconds, key=seconds.__getitem__)
    for path in (destination / fastest).iterdir():
        path.replace(destination / path.name)
    for form in engine.FORMS:
        shutil.rmtree(destination / form)
    return records[fastest].result(seconds)
