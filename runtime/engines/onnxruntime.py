"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import Ids, Logits, require_readable
from thanos_deploy.errors import InputError, PlatformError, UsageError

FOLDER = "onnx"
COMMAND = "thanos-deploy export {bundle} --target onnx"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_TOKEN_INPUTS = ["input_ids", "attention_mask", "position_ids"]


class OnnxRuntimeEngine:
    """A session and the kv cache of the sequences that it is working on.

    The cache stays on the session's device: it is bound as an output of one step and as an input
    of the next, and only the logits become numpy arrays.

    Attributes:
        max_sequence: the most tokens, prompt and answer together.
    """

    def __init__(self, session: Any, ort: Any, *, device: str, max_sequence: int) -> None:
        """Wrap a session of a graph as `exporters.onnx` describes it.

        Args:
            session: an `onnxruntime.InferenceSession`.
            ort: the module `onnxruntime`.
            device: a key of `PROVIDERS`, where the cache is.
            max_sequence: the most tokens, prompt and answer together.
        """
        self._session = session
        self._ort = ort
        self._device = device
        self.max_sequence = max_sequence
        self._outputs = [value.name for value in session.get_outputs()]
        self._past = session.get_inputs()[len(_TOKEN_INPUTS) :]
        self._vocabulary = session.get_outputs()[0].shape[2]
        self._cache: list[Any] = []
        self._mask = np.ones((0, 0), dtype=np.int64)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        require_readable(ids, self._vocabulary)
        self._require_room(ids.shape[1])
        self._mask = np.ones_like(ids) if mask is None else mask
        self._cache = [
            self._place(np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), _dtype(entry)))
            for entry in self._past
        ]
        return self._step(ids)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._require_room(self._mask.shape[1] + 1)
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._step(ids[:, None])

    def _require_room(self, tokens: int) -> None:
        if tokens > self.max_sequence:
            raise UsageError(
                f"{tokens} tokens: the export is made for at most {self.max_sequence}",
                fix="use a shorter prompt or fewer new tokens, or export with a larger --max-seq",
            )

    def _step(self, ids: Ids) -> Logits:
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        binding = self._session.io_binding()
        for name, array in zip(_TOKEN_INPUTS, (ids, self._mask, positions), strict=True):
            binding.bind_ortvalue_input(name, self._place(np.ascontiguousarray(array)))
        for entry, value in zip(self._past, self._cache, strict=True):
            binding.bind_ortvalue_input(entry.name, value)
        binding.bind_output(self._outputs[0], "cpu")
        for name in self._outputs[1:]:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        last: Logits = logits.numpy()[:, -1].astype(np.float32, copy=False)
        return last

    def _place(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device)


def open_engine(bundle: Path, *, provider: str = "cpu") -> OnnxRuntimeEngine:
    """Load `onnx/model.onnx` of a bundle.

    Args:
        bundle: its folder.
        provider: a key of `PROVIDERS`.

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
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings here are about the optimiser's own doings
    try:
        session = ort.InferenceSession(path, options, providers=[PROVIDERS[provider]])
    # ONNX Runtime's exceptions have no common base but Exception, and their module is private.
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime cannot load it ({error})",
            fix="export the model again; the file may be damaged",
        ) from error
    # ONNX Runtime falls back to another provider without an exception.
    provided = session.get_providers()[0]
    if provided != PROVIDERS[provider]:
        raise PlatformError(
            f"{path}: asked ONNX Runtime for {PROVIDERS[provider]} and got {provided}",
            fix="check the driver and the CUDA libraries for cuda; onnxruntime-gpu must be the "
            "only onnxruntime package",
        )
    _require_known_graph(path, session)
    return OnnxRuntimeEngine(
        session, ort, device=provider, max_sequence=_max_sequence(folder / "export.json")
    )


def _require_known_graph(path: Path, session: Any) -> None:
    inputs, outputs = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    blocks = (len(inputs) - len(_TOKEN_INPUTS)) // 2
    parts = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
    if inputs != [*_TOKEN_INPUTS, *(f"past_key_values.{part}" for part in parts)] or outputs != [
        "logits",
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


def _dtype(entry: Any) -> type[np.floating[Any]]:
    return np.float16 if entry.type == "tensor(float16)" else np.float32
