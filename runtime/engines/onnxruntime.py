"""ONNX Runtime, on the CPU, or on an NVIDIA GPU with its CUDA or its TensorRT provider."""

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from runtime import memory
from runtime.engine import Ids, Logits, Weights, require_readable
from runtime.graph import LOGITS, TOKEN_INPUTS, Graph
from runtime.in_place import InPlaceRows
from runtime.memory import Tensor
from runtime.slots import OnnxRuntimeSlots
from thanos_deploy.bundle import onnxfile
from thanos_deploy.bundle.graph_record import CacheBlock, GraphRecord, read_graph_record
from thanos_deploy.bundle.layout import GRAPH, GRAPH_DATA, GRAPH_RECORD, ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, PlatformError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.machine import environment
from thanos_deploy.model import rope

COMMAND = "thanos-deploy export {bundle} --target onnx"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

_PROVIDER_FIX = (
    "`thanos-deploy doctor` says what is missing: the driver, the CUDA libraries, or the TensorRT "
    "that onnxruntime-gpu is linked against"
)

# Sizes of the one profile that the TensorRT provider builds for prefill and decode together.
_USUAL_PROMPT, _MOST_PROMPT, _MOST_SEQUENCES = 128, 1024, 8


class OnnxRuntimeEngine:
    """An engine on a neutral graph, with the KV cache of its current sequences.

    Attributes:
        max_sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    def __init__(self, graph: Graph) -> None:
        self.max_sequence = graph.max_sequence
        self._graph = graph
        self._cache: Sequence[Tensor] = []
        self._mask = np.ones((0, 0), dtype=np.int64)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        require_readable(ids, self._graph.vocabulary)
        self._graph.require_room(ids.shape[1])
        self._mask = np.ones_like(ids) if mask is None else mask
        self._cache = self._graph.empty_cache(len(ids))
        return self._step(ids)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._graph.require_room(self._mask.shape[1] + 1)
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._step(ids[:, None])

    def _step(self, ids: Ids) -> Logits:
        logits, self._cache = self._graph.run(ids, self._mask, self._cache)
        return logits


class OnnxRuntimeInPlaceEngine:
    """An engine on a graph that writes the KV cache in place, with the cache.

    Attributes:
        max_sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    def __init__(self, graph: Graph) -> None:
        self.max_sequence = graph.max_sequence
        self._graph = graph
        self._rows = InPlaceRows(graph, 0)
        self._columns = 0  # tokens of the longest sequence

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        require_readable(ids, self._graph.vocabulary)
        self._graph.require_room(ids.shape[1])
        batch, self._columns = ids.shape
        counts = np.full(batch, self._columns) if mask is None else mask.sum(axis=1)
        to_the_right = np.stack(
            [np.roll(row, count) for row, count in zip(ids, counts.tolist(), strict=True)]
        )
        self._rows = InPlaceRows(self._graph, batch)
        self._rows.add(np.zeros(batch, np.int64))
        return self._rows.read(range(batch), to_the_right, counts)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._columns += 1
        self._graph.require_room(self._columns)
        return self._rows.decode(ids)


def folder(bundle: Bundle) -> str:
    """Return the name of the folder in a bundle that holds the graph."""
    return ONNX


def open_engine(
    bundle: Path, *, provider: str = "cpu", threads: int | None = None
) -> OnnxRuntimeEngine | OnnxRuntimeInPlaceEngine:
    """Load `onnx/model.onnx` of a bundle; see `open_graph`."""
    graph = open_graph(bundle, provider=provider, threads=threads)
    return (OnnxRuntimeInPlaceEngine if graph.in_place else OnnxRuntimeEngine)(graph)


def open_slots(
    bundle: Path,
    *,
    slots: int,
    provider: str = "cpu",
    threads: int | None = None,
    prefix_bytes: int = 0,
    weights: Weights = "map",
) -> OnnxRuntimeSlots:
    """Load `onnx/model.onnx` of a bundle for continuous batching.

    Args:
        bundle: its folder.
        slots: largest number of sequences at a time, at least 1.
        provider, threads: see `open_graph`.
        prefix_bytes, weights: see `runtime.engine.open_slots`.

    Raises:
        InputError: see `open_graph`; or the logits of a row would depend on the other rows, see
            `thanos_deploy.model.rope`.
        PlatformError, UsageError: see `open_graph`.
    """
    graph = open_graph(bundle, provider=provider, threads=threads, weights=weights)
    if graph.change is not None:
        graph.change.require_never(graph.max_sequence, bundle)
    return OnnxRuntimeSlots(graph, slots=slots, prefix_bytes=prefix_bytes)


def open_graph(
    bundle: Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    weights: Weights = "map",
) -> Graph:
    """Load `onnx/model.onnx` of a bundle.

    Args:
        bundle: its folder.
        provider: a key of `PROVIDERS`.
        threads: number of threads for one operator; None for one on each physical core.
        weights: see `runtime.engine.open_slots`.

    Raises:
        PlatformError: onnxruntime is not installed, there is no GPU for the provider, or ONNX
            Runtime chose another provider.
        InputError: the bundle has no such model, ONNX Runtime cannot load it, or its inputs and
            outputs are not those of a graph of `exporters.onnx`.
        UsageError: there is no such provider, or the graph is for another one.
    """
    if provider not in PROVIDERS:
        raise UsageError(
            f"provider {provider!r} is not known", fix=f"give one of {', '.join(PROVIDERS)}"
        )
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise PlatformError(
            "the package onnxruntime-gpu is not installed", fix="pip install onnxruntime-gpu"
        ) from error
    folder = bundle / ONNX
    path = folder / GRAPH
    for needed in (path, folder / GRAPH_DATA, folder / GRAPH_RECORD):
        if not needed.is_file():
            raise InputError(
                f"{needed}: missing", fix=f"run `thanos-deploy export {bundle} --target onnx` first"
            )
    onnxfile.require_own_data(path)
    record = read_graph_record(folder / GRAPH_RECORD)
    if provider != "cpu":
        driver.require()
        if record.graph == "ort":
            raise UsageError(
                f"{path}: this graph was exported for ONNX Runtime's CPU provider and cannot run "
                f"on {provider}",
                fix=f"run `thanos-deploy export {bundle} --target onnx --graph neutral "
                "--overwrite` first",
            )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about ONNX Runtime's own optimisations
    if threads is not None:
        options.intra_op_num_threads = threads
    if weights == "memory":
        content = (folder / GRAPH_DATA).read_bytes()
        options.add_external_initializers_from_files_in_memory(
            [GRAPH_DATA], [content], [len(content)]
        )
    unloaded = ""
    if provider != "cpu":
        unloaded = _load_cuda(ort)
    wanted: list[Any] = [PROVIDERS[provider]]
    if provider == "tensorrt":
        # Operators that TensorRT does not support run on CUDA.
        wanted = [(wanted[0], tensorrt_options(Bundle.open(bundle))), PROVIDERS["cuda"]]
    try:
        session = ort.InferenceSession(path, options, providers=wanted, enable_fallback=0)
    # ONNX Runtime's exceptions have no common base but Exception, and their module is private.
    except Exception as error:
        if "install TensorRT libraries" in str(error):
            raise PlatformError(
                f"{path}: asked ONNX Runtime for {PROVIDERS[provider]} and got none: the libraries "
                f"of TensorRT are not there{unloaded}",
                fix=_PROVIDER_FIX,
            ) from error
        raise InputError(
            f"{path}: ONNX Runtime cannot load it ({error})",
            fix="export the model again; the file may be damaged",
        ) from error
    # If a provider's libraries are missing, ONNX Runtime takes another one without an exception.
    provided = session.get_providers()[0]
    if provided != PROVIDERS[provider]:
        raise PlatformError(
            f"{path}: asked ONNX Runtime for {PROVIDERS[provider]} and got {provided}{unloaded}",
            fix=_PROVIDER_FIX,
        )
    _require_known_graph(path, session)
    return Graph(
        session,
        ort,
        memory=memory.HostMemory() if provider == "cpu" else memory.open_cuda(ort),
        max_sequence=record.max_sequence,
        change=rope.change_in(bundle),
    )


def _load_cuda(ort: Any) -> str:
    """Load the libraries that ONNX Runtime's CUDA provider is linked against.

    They are in the pip packages `nvidia-*`, where the dynamic loader does not look. `preload_dlls`
    knows their names, and looks in a given folder or beside ONNX Runtime. It only prints which
    libraries it does not find.

    Returns:
        the libraries that are missing, after a colon; empty if none is.
    """
    said = io.StringIO()
    nvidia = find_spec("nvidia")
    places = (nvidia.submodule_search_locations if nvidia else None) or ()
    with contextlib.redirect_stdout(said):
        for folder in (folder for place in places for folder in sorted(Path(place).glob("*/lib"))):
            ort.preload_dlls(directory=str(folder))
        said.truncate(0)  # each folder lacks the libraries of the other folders
        said.seek(0)
        ort.preload_dlls()
    return f": {'; '.join(said.getvalue().splitlines())}" if said.getvalue() else ""


def tensorrt_options(bundle: Bundle) -> dict[str, str]:
    """Return the options for ONNX Runtime's TensorRT provider to build and cache engines.

    The engines and timings are kept in the user's cache folder, under the hash of the graph, so
    that a second start loads the engine that the first one built.

    Args:
        bundle: a bundle whose stage onnx is finished.
    """
    record = read_graph_record(bundle.path / ONNX / GRAPH_RECORD)
    name = bundle.stages[ONNX].files[f"{ONNX}/{GRAPH}"].sha256[:16]
    cache = str(environment.cache_folder() / "onnxruntime-tensorrt" / name)
    return {
        **tensorrt_build_options(record),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        "trt_detailed_build_log": "1",
    }


def tensorrt_build_options(record: GraphRecord) -> dict[str, str]:
    """Return the TensorRT provider's build options for a graph, the same on every machine.

    Sparse kernels are allowed if any weight of the graph is known to have the 2:4 pattern.

    Args:
        record: the graph's export.json.
    """
    sparse = any(weight.pattern == "2:4" and weight.pattern_holds for weight in record.weights)
    least, usual, most = (
        _shapes(record.cache.blocks, batch, sequence, past)
        for batch, sequence, past in (
            (1, 1, 0),
            (1, min(_USUAL_PROMPT, record.max_sequence), 0),
            (
                _MOST_SEQUENCES,
                min(_MOST_PROMPT, record.max_sequence),
                record.max_sequence - 1,
            ),
        )
    )
    return {
        "trt_sparsity_enable": str(int(sparse)),
        "trt_fp16_enable": str(int(record.dtype == "fp16")),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": most,
    }


def _shapes(blocks: Sequence[CacheBlock], batch: int, sequence: int, past: int) -> str:
    """Return the shapes of all inputs as the provider reads them: `name:1x2,name:3x4`."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (batch, sequence),
        "attention_mask": (batch, past + sequence),
        "position_ids": (batch, sequence),
    }
    for index, block in enumerate(blocks):
        for part, width in (("key", block.key_dim), ("value", block.value_dim)):
            shapes[f"past_key_values.{index}.{part}"] = (batch, block.heads, past, width)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _require_known_graph(path: Path, session: Any) -> None:
    inputs, outputs = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    blocks = (len(inputs) - len(TOKEN_INPUTS)) // 2
    parts = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
    if inputs != [*TOKEN_INPUTS, *(f"past_key_values.{part}" for part in parts)] or outputs != [
        LOGITS,
        *(f"present.{part}" for part in parts),
    ]:
        raise InputError(
            f"{path}: inputs {', '.join(inputs)} and outputs {', '.join(outputs)} are not those "
            "of an export of thanos-deploy",
            fix="export the model with `thanos-deploy export --target onnx`",
        )
