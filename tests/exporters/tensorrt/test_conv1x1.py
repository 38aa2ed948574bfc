import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters.tensorrt import conv1x1, engine
from tests.conftest import Exported

# The same products summed in another order, in float32.
TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_convolutions_compute_what_the_products_did(
    exported_two_four: Exported, model_type: str, tmp_path: Path
) -> None:
    before = exported_two_four(model_type) / "onnx"
    names = [
        weight["name"] for weight in json.loads((before / "export.json").read_text())["weights"]
    ]
    after = tmp_path / "model.onnx"
    conv1x1.rewrite(
        before / "model.onnx", after, weights={f"{n}.weight" for n in names}, data="model.onnx.data"
    )
    onnx.checker.check_model(str(after))
    nodes = onnx.load(after, load_external_data=False).graph.node
    # Nodes keep the names of the layers, by which an engine's log is read.
    assert {node.name for node in nodes if node.op_type == "Conv"} == set(names)

    sessions = [
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (before / "model.onnx", after)
    ]
    rng = np.random.default_rng(0)
    for batch, past, sequence in ((1, 0, 7), (2, 5, 3), (3, 4, 1)):
        feeds = {
            "input_ids": rng.integers(0, 257, (batch, sequence)),
            "attention_mask": np.ones((batch, past + sequence), np.int64),
            "position_ids": np.tile(np.arange(past, past + sequence), (batch, 1)),
        }
        for entry in sessions[0].get_inputs()[3:]:
            shape = (batch, entry.shape[1], past, entry.shape[3])
            feeds[entry.name] = rng.standard_normal(shape).astype(np.float32)
        want, got = (session.run(None, feeds) for session in sessions)
        for expected, actual in zip(want, got, strict=True):
            assert np.abs(expected - actual).max() <= TOLERANCE * np.ptp(expected)


def test_two_four_is_seen_along_the_inputs_of_either_form(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    before = exported_two_four("llama") / "onnx" / "model.onnx"
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"]
    after = tmp_path / "model.onnx"
    conv1x1.rewrite(before, after, weights={f"{names[0]}.weight"}, data="model.onnx.data")
    assert engine.read_weights(before, names) == engine.read_weights(after, names)
    assert all(weight.holds for weight in engine.read_weights(after, names))
