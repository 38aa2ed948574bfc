"""ONNX Runtime, on the CPU or on an NVIDIA GPU, there with its own kernels or with TensorRT's."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from runtime import floats, memory
from runtime.engine import Ids, Logits, require_readable
from runtime.floats import Float
from runtime.memory import Memory, Tensor
from thanos_deploy import environment, gpu, onnxfile
from thanos_deploy.artifact import Bundle, Json
from thanos_deploy.errors import InputError, PlatformError, UsageError

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

# Of the one profile that the TensorRT provider builds for prefill and decode together.
_USUAL_PROMPT, _MOST_PROMPT, _MOST_SEQUENCES = 128, 1024, 8

# Tokens of a text that are read at once: a row of logits is vocabulary-sized.
_TOKENS_AT_ONCE = 256

_TOKEN_INPUTS = ["input_ids", "attention_mask", "position_ids"]
_LOGITS = "logits"


class Graph:
    """A session of the graph that `exporters.onnx` describes: tokens and a kv cache in and out.

    A cache is a list of `memory.Tensor`, one for each input `past_key_values.*`, and stays on the
    session's device: the outputs of one run are the inputs of the next. Of the logits only those
    that are asked for are copied to the host.

    Attributes:
        max_sequence: the most tokens, prompt and answer together.
        vocabulary: how many ids there are.
        logits: "all" or "last"; see `exporters.onnx`.
        memory: of the device.
    """

    def __init__(self, session: Any, ort: Any, *, memory: Memory, max_sequence: int) -> None:
        """Wrap a session.

        Args:
            session: an `onnxruntime.InferenceSession`.
            ort: the module `onnxruntime`.
            memory: of the device that the session runs on.
            max_sequence: the most tokens, prompt and answer together.

        Raises:
            InputError: the cache or the logits are of a type that is not known.
        """
        self._session = session
        self._ort = ort
        self.memory = memory
        self.max_sequence = max_sequence
        logits, *present = session.get_outputs()
        self._present = [value.name for value in present]
        self._past = session.get_inputs()[len(_TOKEN_INPUTS) :]
        self._types = [floats.named(entry.type, tensor=entry.name) for entry in self._past]
        self._logits_type = floats.named(logits.type, tensor=logits.name)
        self.logits = "last" if logits.shape[1] == 1 else "all"
        self.vocabulary: int = logits.shape[2]

    def empty_cache(self, batch: int) -> list[Tensor]:
        """The cache of sequences of which nothing has been read, each [batch, heads, 0, dim]."""
        return [
            replace(
                self.memory.allocate(0, type_), shape=(batch, entry.shape[1], 0, entry.shape[3])
            )
            for entry, type_ in zip(self._past, self._types, strict=True)
        ]

    def run(
        self,
        ids: Ids,
        mask: Ids,
        cache: Sequence[Tensor],
        *,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Logits, Sequence[Tensor]]:
        """Append tokens to every sequence.

        Args:
            ids: int64[batch, tokens].
            mask: int64[batch, past + tokens], 0 for padding, which must be on the left.
            cache: of the past.
            into: where to write the longer cache; None for memory of the session's own.

        Returns:
            float32[batch, vocabulary], the logits after the last token, and the longer cache.
        """
        logits, longer = self._append(ids, mask, cache, into)
        return self._rows(logits, tokens=1), longer

    def read(self, ids: Ids) -> Iterator[Logits]:
        """Read one text from its beginning, a part at a time, as chunked prefill does.

        Args:
            ids: int64[tokens].

        Yields:
            float32[part, vocabulary], the logits after every token, in order.

        Raises:
            InputError: the graph has not got them.
            UsageError: no token, an id outside the vocabulary, or more tokens than the export is
                made for.
        """
        require_all_logits(self.logits)
        require_readable(ids[None], self.vocabulary)
        self.require_room(len(ids))
        cache: Sequence[Tensor] = self.empty_cache(1)
        for start in range(0, len(ids), _TOKENS_AT_ONCE):
            part = ids[None, start : start + _TOKENS_AT_ONCE]
            mask = np.ones((1, start + part.shape[1]), dtype=np.int64)
            logits, cache = self._append(part, mask, cache, None)
            yield self._rows(logits, tokens=part.shape[1])

    def _append(
        self, ids: Ids, mask: Ids, cache: Sequence[Tensor], into: Sequence[Tensor] | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`run`, with all logits that the graph gives, on the device: [batch, ..., vocabulary]."""
        device = self.memory.device
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        binding = self._session.io_binding()
        tokens = [
            self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)
            for array in (ids, mask, positions)
        ]
        for name, value in zip(_TOKEN_INPUTS, tokens, strict=True):
            binding.bind_ortvalue_input(name, value)
        for entry, past in zip(self._past, cache, strict=True):
            binding.bind_input(entry.name, device, 0, past.type.onnx, past.shape, past.address)
        binding.bind_output(_LOGITS, device)
        for index, name in enumerate(self._present):
            if into is None:
                binding.bind_output(name, device)
            else:
                room = into[index]
                binding.bind_output(name, device, 0, room.type.onnx, room.shape, room.address)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        logits, *longer = binding.get_outputs()
        if into is None:
            into = [_tensor(value, its) for value, its in zip(longer, self._types, strict=True)]
        return _tensor(logits, self._logits_type), into

    def _rows(self, logits: Tensor, *, tokens: int) -> Logits:
        """float32[batch * tokens, vocabulary], the last of the logits of every sequence."""
        batch, given, vocabulary = logits.shape
        each = replace(logits, shape=(batch, 1, given, vocabulary))
        raw = self.memory.read(each.lines(range(batch), range(given - tokens, given)))
        return logits.type.widen(raw.view(logits.type.bits).reshape(-1, vocabulary))

    def require_room(self, tokens: int) -> None:
        """Refuse sequences that are longer than the export is made for.

        Raises:
            UsageError: they are.
        """
        if tokens > self.max_sequence:
            raise UsageError(
                f"{tokens} tokens: the export is made for at most {self.max_sequence}",
                fix="use a shorter prompt or fewer new tokens, or export with a larger --max-seq",
            )


def _tensor(value: Any, type_: Float) -> Tensor:
    """A result of ONNX Runtime, which owns the memory."""
    return Tensor(value.data_ptr(), tuple(value.shape()), type_, value)


def require_all_logits(logits: str) -> None:
    """Refuse a graph that cannot be judged by what it makes of a text.

    Args:
        logits: what the graph gives, "all" or "last".

    Raises:
        InputError: it gives the logits after the last token only.
    """
    if logits != "all":
        raise InputError(
            f"the graph was exported with --logits {logits}, and the quality of a model is in its "
            "logits after every token",
            fix="run `thanos-deploy export OUT --target onnx --logits all --overwrite` first",
        )


class OnnxRuntimeEngine:
    """A graph and the kv cache of the sequences that it is working on.

    Attributes:
        max_sequence: the most tokens, prompt and answer together.
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


def folder(bundle: Bundle) -> str:
    """The part of a bundle with the graph."""
    return "onnx"


def open_engine(
    bundle: Path, *, provider: str = "cpu", threads: int | None = None
) -> OnnxRuntimeEngine:
    """Load `onnx/model.onnx` of a bundle; see `open_graph`."""
    return OnnxRuntimeEngine(open_graph(bundle, provider=provider, threads=threads))


def open_graph(bundle: Path, *, provider: str = "cpu", threads: int | None = None) -> Graph:
    """Load `onnx/model.onnx` of a bundle.

    Args:
        bundle: its folder.
        provider: a key of `PROVIDERS`.
        threads: how many work on one operator; None for one on each physical core.

    Raises:
        PlatformError: onnxruntime is not installed, or it gave another provider than asked for.
        InputError: there is no such model, ONNX Runtime cannot load it, or its inputs are not
            those of `exporters.onnx`.
        UsageError: there is no such provider.
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
    folder = bundle / "onnx"
    path = folder / "model.onnx"
    for needed in (path, folder / "model.onnx.data", folder / "export.json"):
        if not needed.is_file():
            raise InputError(
                f"{needed}: missing", fix=f"run `thanos-deploy export {bundle} --target onnx` first"
            )
    onnxfile.require_own_data(path)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings here are about the optimiser's own doings
    if threads is not None:
        options.intra_op_num_threads = threads
    unloaded = ""
    if provider != "cpu":
        gpu.require()
        unloaded = _load_cuda(ort)
    wanted: list[Any] = [PROVIDERS[provider]]
    if provider == "tensorrt":
        # What TensorRT does not take runs on CUDA.
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
    # Where a provider's libraries are missing, ONNX Runtime takes another one without an exception.
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
        max_sequence=_max_sequence(folder / "export.json"),
    )


def _load_cuda(ort: Any) -> str:
    """Load the libraries that ONNX Runtime's CUDA provider is linked against.

    They are in pip's packages `nvidia-*`, where no loader looks for them. ONNX Runtime knows the
    names; it looks beside itself, and where it is told to. What it does not find it prints and
    says nothing else of.

    Returns:
        what is missing, after a colon; empty if nothing is.
    """
    said = io.StringIO()
    nvidia = find_spec("nvidia")
    places = (nvidia.submodule_search_locations if nvidia else None) or ()
    with contextlib.redirect_stdout(said):
        for folder in (folder for place in places for folder in sorted(Path(place).glob("*/lib"))):
            ort.preload_dlls(directory=str(folder))
        said.truncate(0)  # whatever is in another folder was missing in this one
        said.seek(0)
        ort.preload_dlls()
    return f": {'; '.join(said.getvalue().splitlines())}" if said.getvalue() else ""


def tensorrt_options(bundle: Bundle) -> dict[str, str]:
    """How ONNX Runtime's TensorRT provider is to build and keep the engines of a bundle's graph.

    The engine and the timings are kept in the user's cache, by the hash of the graph, so that a
    second start loads what the first one built.

    Args:
        bundle: with the stage onnx finished.
    """
    record = json.loads((bundle.path / "onnx" / "export.json").read_bytes())
    name = bundle.stages["onnx"].files["onnx/model.onnx"].sha256[:16]
    cache = str(environment.cache_folder() / "onnxruntime-tensorrt" / name)
    return {
        **tensorrt_build_options(record),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        "trt_detailed_build_log": "1",
    }


def tensorrt_build_options(record: Json) -> dict[str, str]:
    """What the engines of a graph are to be like, on any machine.

    Sparse kernels are allowed where a weight of the written graph is known to hold 2:4.

    Args:
        record: the graph's export.json.
    """
    sparse = any(
        # Older graphs have one pattern for all weights.
        weight.get("pattern", record["pattern"]) == "2:4" and weight["pattern_holds"]
        for weight in record["weights"]
    )
    least, usual, most = (
        _shapes(record["cache"]["blocks"], batch, sequence, past)
        for batch, sequence, past in (
            (1, 1, 0),
            (1, min(_USUAL_PROMPT, record["max_sequence"]), 0),
            (
                _MOST_SEQUENCES,
                min(_MOST_PROMPT, record["max_sequence"]),
                record["max_sequence"] - 1,
            ),
        )
    )
    return {
        "trt_sparsity_enable": str(int(sparse)),
        "trt_fp16_enable": str(int(record["dtype"] == "fp16")),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": most,
    }


def _shapes(blocks: list[Json], batch: int, sequence: int, past: int) -> str:
    """The shapes of all inputs, as the provider reads them: `name:1x2,name:3x4`."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (batch, sequence),
        "attention_mask": (batch, past + sequence),
        "position_ids": (batch, sequence),
    }
    for index, block in enumerate(blocks):
        for part in ("key", "value"):
            shapes[f"past_key_values.{index}.{part}"] = (
                batch,
                block["heads"],
                past,
                block[f"{part}_dim"],
            )
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _require_known_graph(path: Path, session: Any) -> None:
    inputs, outputs = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    blocks = (len(inputs) - len(_TOKEN_INPUTS)) // 2
    parts = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
    if inputs != [*_TOKEN_INPUTS, *(f"past_key_values.{part}" for part in parts)] or outputs != [
        _LOGITS,
        *(f"present.{part}" for part in parts),
    ]:
        raise InputError(
            f"{path}: inputs {', '.join(inputs)} and outputs {', '.join(outputs)} are not those "
            "of an export of thanos-deploy",
            fix="export the model with `thanos-deploy export --target onnx`",
        )


def _max_sequence(path: Path) -> int:
    try:
        value = json.loads(path.read_bytes())["max_sequence"]
        if type(value) is int and value > 0:
            return value
        problem = f"max_sequence is {value!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise InputError(
        f"{path}: not a readable record of an export ({problem})",
        fix="export the model again with --overwrite",
    )
