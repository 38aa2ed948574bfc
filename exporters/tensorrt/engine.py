"""A TensorRT engine of a bundle's graph, and the proof of which layers run sparse.

    model.engine    the engine that the GPU loads
    build.json      how it was built, its profiles, and the verdict on every linear layer
    build.log       the full log of the builder
    layers.json     the layers of the finished engine, if a GPU could load it
    timing.cache    measured times of kernels, for a faster and repeatable next build
    model.onnx      with its data, only if the linear layers were rewritten for this engine

TensorRT builds on the GPU of this machine, and for it. TensorRT-RTX builds ahead of time, without a
GPU, for the GPUs that are named; it chooses kernels when the engine is loaded on one of them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from exporters.tensorrt import builder, conv1x1, proof
from exporters.tensorrt import log as _buildlog
from exporters.tensorrt.builder import Order
from exporters.tensorrt.library import Library
from exporters.tensorrt.profiles import profiles, shapes
from thanos_deploy.bundle import files, onnxfile
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.engine_record import BuildRecord, LayerProof, Summary
from thanos_deploy.bundle.graph_record import read_graph_record
from thanos_deploy.bundle.layout import (
    BUILD,
    BUILD_FORMAT,
    BUILD_LOG,
    ENGINE,
    ENGINE_LAYERS,
    GRAPH,
    GRAPH_DATA,
    GRAPH_RECORD,
    TIMING_CACHE,
)
from thanos_deploy.errors import DeployError, InputError, PlatformError, ResourceError, UsageError
from thanos_deploy.progress import OnProgress, silent

FORMS = ("matmul", "conv1x1")

_SMALLER = "use a machine with more memory, or a smaller --batch, --seq and --max-seq"
_ORDER = "order.json"
_PROMPT = (128, 1024)


def export(
    onnx: Path,
    destination: Path,
    *,
    library: Library,
    architectures: Sequence[str],
    batch: Sequence[int] = (1, 8),
    prompt: Sequence[int] | None = None,
    sparse: bool | None = None,
    form: str = "matmul",
    compatibility: str = "none",
    timing_cache: Path | None = None,
    on_progress: OnProgress = silent,
) -> BuildRecord:
    """Build an engine and judge every linear layer.

    Args:
        onnx: the folder that `exporters.onnx.graph.export` wrote; the engine has its dtypes.
        destination: an existing folder.
        library: the library that builds the engine.
        architectures: GPUs to build for, such as "sm90"; only the GPU of this machine for a library
            that does not build ahead of time.
        batch, prompt: see `profiles.profiles`. A prompt of None means 128 tokens, and 1024 at most,
            or the longest sequence of the graph if that is shorter.
        sparse: let the builder use sparse kernels; None to do so if any linear layer holds 2:4 in
            the graph.
        form: form of the linear layers, one of `FORMS`.
        compatibility: one of `exporters.options.Compatibility`.
        timing_cache: timing cache of an earlier build, to start from.
        on_progress: called with the builder's progress.

    Returns:
        The content of build.json.

    Raises:
        PlatformError: the library, the driver or the GPU is missing, or the library crashed.
        UsageError: the library cannot build what was asked for.
        InputError: the library does not take the graph.
        ResourceError: the builder ran out of memory.
    """
    graph = read_graph_record(onnx / GRAPH_RECORD)
    longest = graph.max_sequence
    ways = profiles(batch, prompt or [min(size, longest) for size in _PROMPT], longest)
    source = onnx / GRAPH
    weights = read_weights(source, [weight.name for weight in graph.weights])
    use_sparse = any(weight.holds for weight in weights) if sparse is None else sparse
    if form == "conv1x1":
        source = destination / GRAPH
        names = {f"{weight.name}.weight" for weight in weights}
        conv1x1.rewrite(onnx / GRAPH, source, weights=names, data=GRAPH_DATA)
    if timing_cache is not None:
        (destination / TIMING_CACHE).write_bytes(timing_cache.read_bytes())
    inputs = _inputs(source)
    order = Order(
        module=library.package.module,
        graph=os.path.relpath(source, destination),
        engine=ENGINE,
        log=BUILD_LOG,
        timing_cache=TIMING_CACHE,
        sparse=use_sparse,
        compatibility=compatibility,
        architectures=tuple(architectures) if library.ahead_of_time else (),
        profiles=tuple({name: shapes(way, dims) for name, dims in inputs.items()} for way in ways),
    )
    started = time.perf_counter()
    built = _carry_out(order, library, destination, on_progress)
    engine_layers, layers = proof_of(destination, weights, sparse=use_sparse, library=library)
    record = BuildRecord(
        format=BUILD_FORMAT,
        target=library.target,
        library=built.library,
        arch=tuple(architectures),
        dtype=graph.dtype,
        sparse_weights=use_sparse,
        sparse_form=form,
        compatibility=compatibility,
        profiles=ways,
        max_sequence=longest,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=built.peak_memory_bytes,
        engine_bytes=(destination / ENGINE).stat().st_size,
        network_layers=built.network_layers,
        engine_layers=engine_layers,
        layers=layers,
        summary=Summary.of(layers),
    )
    files.write_json(destination / BUILD, encode(record))
    return record


def proof_of(
    folder: Path, weights: Sequence[proof.Weight], *, sparse: bool, library: Library
) -> tuple[int, tuple[LayerProof, ...]]:
    """Judge every linear layer from the files of a build.

    Args:
        folder: the folder with the builder's log and, if there is one, the inspector's JSON.
        weights: the weights of the linear layers in the graph.
        sparse: whether the builder was allowed to use sparse kernels.
        library: the library that built the engine.

    Returns:
        The number of layers of the engine that the files list, and the verdicts.
    """
    log = (folder / BUILD_LOG).read_text(encoding="utf-8").splitlines()
    inspected = folder / ENGINE_LAYERS
    # The inspector's list if a GPU loaded the engine, else the list in the builder's log.
    found = (
        _buildlog.inspected_layers(inspected.read_text(encoding="utf-8"))
        if inspected.exists()
        else _buildlog.listed_layers(log)
    )
    layers = proof.prove(
        weights,
        _buildlog.sparsity_lines(log),
        _buildlog.timings(log),
        found,
        sparse_allowed=sparse,
        kernels_known=not library.ahead_of_time,
    )
    return len(found), tuple(layers)


def read_weights(graph: Path, names: Sequence[str]) -> list[proof.Weight]:
    """Read the weights of linear layers from an ONNX file, and count their 2:4 groups.

    Args:
        graph: the file; a layer is a MatMul [in, out] or a convolution [out, in, 1, 1].
        names: full names of the layers.

    Raises:
        InputError: the file is damaged, its data lie outside its folder, or it has no matrix for a
            layer.
    """
    onnxfile.require_own_data(graph)
    try:
        initializers = ir.load(graph).graph.initializers
        return [proof.weight(name, _matrix(initializers, graph, name)) for name in names]
    except (OSError, ValueError, DecodeError) as error:
        raise InputError(
            f"{graph}: not readable ({type(error).__name__}: {error})",
            fix="export the model again with --overwrite",
        ) from error


def _matrix(initializers: Mapping[str, ir.Value], graph: Path, name: str) -> NDArray[np.generic]:
    value = initializers.get(f"{name}.weight")
    if value is None or value.const_value is None:
        raise InputError(
            f"{graph}: has no matrix for the weight of {name}",
            fix="export with --dtype fp16 or fp32; ONNX Runtime's int8 is for ONNX Runtime only",
        )
    array = value.const_value.numpy()
    return array[:, :, 0, 0] if array.ndim == 4 else array.T


def _inputs(graph: Path) -> dict[str, list[int | str]]:
    """Dimensions of every input, by name: a number, or the name of a dynamic dimension."""
    dims: dict[str, list[int | str]] = {}
    for value in ir.load(graph).graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        dims[value.name] = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return dims


def _carry_out(
    order: Order, library: Library, folder: Path, on_progress: OnProgress
) -> builder.Result:
    """Run the builder in a subprocess; see `builder`."""
    files.write_record(folder / _ORDER, order)
    on_progress(0, 1)
    last = ""
    with (
        # A file, because nobody reads a second pipe while the first one is read.
        TemporaryFile("w+", encoding="utf-8", errors="replace") as printed,
        subprocess.Popen(
            # -P: do not import a folder `exporters` that happens to lie in the working directory.
            [sys.executable, "-P", "-m", "exporters.tensorrt.builder", _ORDER],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
        ) as child,
    ):
        try:
            for last in _lines(child):
                if last.startswith("["):
                    done, total = loads(last)
                    on_progress(done, total)
            child.wait()
            printed.seek(0)
            complaint = printed.read()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise _error(order.graph, library.package.on_pypi, child.returncode, last, complaint)
    on_progress(1, 1)
    result = files.read_record(folder / builder.RESULT, builder.Result)
    for name in (_ORDER, builder.RESULT):
        (folder / name).unlink()
    return result


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    assert child.stdout is not None
    yield from child.stdout


def _error(graph: str, package: str, code: int, last: str, complaint: str) -> DeployError:
    if last.startswith("{"):
        failure = decode(builder.Failure, loads(last))
        message = f"{package}: {failure.message}"
        match failure.kind:
            case "machine":
                return PlatformError(message, fix="`thanos-deploy doctor` says what is missing")
            case "memory":
                return ResourceError(message, fix=_SMALLER)
            case "usage":
                return UsageError(message, fix="choose a supported value, or another --target")
            case _:
                return InputError(
                    f"{graph}: {message}",
                    fix=f"report this model type with the version of {package}",
                )
    if code == -signal.SIGKILL:
        return ResourceError(
            f"{package}: the builder was killed, most likely because memory ran out",
            fix=_SMALLER,
        )
    return PlatformError(
        f"{package}: the builder stopped with code {code} ({complaint.strip()[-500:]})",
        fix="report this with the version of the library and of the driver",
    )
