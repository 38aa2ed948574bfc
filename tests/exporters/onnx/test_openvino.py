"""OpenVINO reads the graph that is exported, and computes what ONNX Runtime does."""

import numpy as np
import onnxruntime as ort
import openvino
import pytest
from numpy.typing import NDArray

from tests.conftest import VOCABULARY, Exported

pytestmark = pytest.mark.slow


def feeds(
    ids: NDArray[np.int64], past: int, cache: dict[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.generic]]:
    count = ids.shape[1]
    return {
        "input_ids": ids,
        "attention_mask": np.ones((1, past + count), dtype=np.int64),
        "position_ids": np.arange(past, past + count)[None],
        **cache,
    }


@pytest.mark.parametrize("kind", ["two_four", "shrunk", "ort"])
def test_it_computes_the_logits_of_onnx_runtime(
    exported_two_four: Exported, exported_shrunk: Exported, exported_ort: Exported, kind: str
) -> None:
    """A prefill of 8 tokens and four decode steps; "shrunk" has blocks of different widths."""
    kinds = {"two_four": exported_two_four, "shrunk": exported_shrunk, "ort": exported_ort}
    folder = kinds[kind]("llama") / "onnx"
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(
        folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    names = [value.name for value in session.get_inputs()]
    shapes = {value.name: value.shape for value in session.get_inputs()[3:]}
    outputs = [value.name for value in session.get_outputs()]
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(1, 12))
    cache = {
        name: np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32)
        for name, shape in shapes.items()
    }
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
        given = feeds(ids[:, start:stop], start, cache)
        wanted = session.run(outputs, {name: given[name] for name in names})
        found = compiled(given)
        for name, value in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * np.ptp(value))
        cache = dict(zip(shapes, wanted[1:], strict=True))
