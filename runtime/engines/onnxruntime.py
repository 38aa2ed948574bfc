"""ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import Ids, Logits
from thanos_deploy.errors import InputError, PlatformError

PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeEngine:
    """A session and the kv cache of the sequences that it is working on.

    The cache stays inside ONNX Runtime: what one step returns is handed to the next one as it is,
    and only the logits become numpy arrays.
    """

    def __init__(self, session: Any, ort: Any) -> None:
        """Wrap a session of a graph as `exporters.onnx` describes it.

        Args:
            session: an `onnxruntime.InferenceSession`.
            ort: the module `onnxruntime`.
        """
        self._session = session
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._outputs = [value.name for value in session.get_outputs()]
        self._past = {
            value.name: value.shape
            for value in session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self._cache: list[Any] = []
        self._mask = np.ones((0, 0), dtype=np.int64)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        self._mask = np.ones_like(ids) if mask is None else mask
        self._cache = [
            self._value(np.zeros((len(ids), heads, 0, dim), dtype=np.float32))
            for _, heads, _, dim in self._past.values()
        ]
        return self._step(ids)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._step(ids[:, None])

    def _step(self, ids: Ids) -> Logits:
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {
            "input_ids": self._value(ids),
            "attention_mask": self._value(self._mask),
            "position_ids": self._value(np.ascontiguousarray(positions)),
            **dict(zip(self._past, self._cache, strict=True)),
        }
        logits, *self._cache = self._session.run_with_ort_values(self._outputs, feeds)
        last: Logits = logits.numpy()[:, -1]
        return last


def open_engine(bundle: Path) -> OnnxRuntimeEngine:
    """Load `onnx/model.onnx` of a bundle.

    Raises:
        PlatformError: onnxruntime is not installed, or it gave another provider than asked for.
        InputError: there is no such model, or ONNX Runtime cannot load it.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise PlatformError(
            "the package onnxruntime-gpu is not installed", fix="pip install onnxruntime-gpu"
        ) from error
    path = bundle / "onnx" / "model.onnx"
    if not path.is_file():
        raise InputError(
            f"{path}: missing", fix=f"run `thanos-deploy export {bundle} --target onnx` first"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings here are about the optimiser's own doings
    try:
        session = ort.InferenceSession(path, options, providers=[PROVIDER])
    # ONNX Runtime's exceptions have no common base but Exception, and their module is private.
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime cannot load it ({error})",
            fix="export the model again; the file may be damaged",
        ) from error
    # ONNX Runtime falls back to another provider without an exception.
    provided = session.get_providers()[0]
    if provided != PROVIDER:
        raise PlatformError(
            f"{path}: asked ONNX Runtime for {PROVIDER} and got {provided}",
            fix="reinstall onnxruntime-gpu; it must be the only onnxruntime package",
        )
    return OnnxRuntimeEngine(session, ort)
