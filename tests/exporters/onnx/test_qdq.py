import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

import exporters.onnx.graph
from exporters.onnx import qdq
from exporters.tensorrt import conv1x1
from tests.conftest import VOCABULARY, Exported, stock_model
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.solver.grid import parse

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quantised(exported_two_four: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8-qdq graph of a small LLaMA that was pruned to 2:4."""
    folder = tmp_path_factory.mktemp("qdq")
    exporters.onnx.graph.export(
        Checkpoint.open(exported_two_four("llama") / "model"),
        folder,
        pattern=SemiStructured(2, 4),
        dtype="int8-qdq",
    )
    return folder


def test_weights_are_int8_within_half_a_step_and_keep_their_zeros(
    quantised: Path, exported_two_four: Exported
) -> None:
    stored = load_file(exported_two_four("llama") / "model" / "model.safetensors")
    tensors = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(quantised / "model.onnx").graph.initializer
    }
    record = json.loads((quantised / "export.json").read_text())
    assert len(record["weights"]) == 14
    for weight in record["weights"]:
        name = f"{weight['name']}.weight"
        levels, scales = tensors[name], tensors[f"{name}.scale"].astype(np.float32)
        assert levels.dtype == np.int8
        assert weight["pattern_holds"]
        # fp16, as it was before it was quantised; a scale in fp16 is off by 2^-11 of itself.
        original = stored[name].half().float().numpy().T
        error = np.abs(levels * scales - original)
        assert (error <= scales * (0.5 + 127 * 2**-10)).all()
        assert (levels[original == 0] == 0).all()
    assert 0 < record["rounding"]["weights"] < 0.05
    assert record["rounding"]["weights"] < record["rounding"]["activations"] < 0.2


def test_every_product_is_int8_by_int8_and_its_result_int8_where_the_weights_are_two_four(
    quantised: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    def around(path: Path) -> tuple[int, int, int]:
        nodes = onnx.load(path, load_external_data=False).graph.node
        made = {name: node for node in nodes for name in node.output}
        read = {name: node for node in nodes for name in node.input}
        products = [node for node in nodes if node.name.endswith("_proj")]
        kinds = [made[name].op_type for node in products for name in node.input]
        assert set(kinds) == {"DequantizeLinear"}
        quantisers = sum(node.op_type == "QuantizeLinear" for node in nodes)
        results = sum(read[node.output[0]].op_type == "QuantizeLinear" for node in products)
        return len(products), results, quantisers

    # In each of two blocks q, k and v share what they read, and so do gate and up.
    assert around(quantised / "model.onnx") == (14, 14, 14 + 8)
    exporters.onnx.graph.export(
        Checkpoint.open(tiny_llama), tmp_path, pattern=None, dtype="int8-qdq"
    )
    assert around(tmp_path / "model.onnx") == (14, 0, 8)


def test_the_codes_of_a_quantised_model_are_those_of_the_file(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Nothing is rounded again; a model with scales for groups has no such codes."""
    for name in ("model", "codes", "other", "onnx"):
        (tmp_path / name).mkdir()
    segments = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))
    source, grid = Checkpoint.open(tiny_llama), parse("int8:row")
    quantise_model(source, segments, tmp_path / "model", tmp_path / "codes", grid)
    checkpoint, codes = Checkpoint.open(tmp_path / "model"), Codes.open(tmp_path / "codes")
    record = exporters.onnx.graph.export(
        checkpoint, tmp_path / "onnx", pattern=None, dtype="int8-qdq", codes=codes
    )
    assert record.quantised == checkpoint.linears
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name in checkpoint.linears:
        wanted = codes.of(name, checkpoint.linear(name))
        assert np.abs(tensors[f"{name}.weight"]).max() > 100
        np.testing.assert_array_equal(tensors[f"{name}.weight"].T, wanted.codes.numpy())
        scales = tensors[f"{name}.weight.scale"].astype(np.float32)
        np.testing.assert_array_equal(scales, wanted.scale[:, 0].numpy())
    other = replace(codes, grid=parse("int8"))
    with pytest.raises(UsageError, match="quantised to int8:32: engines"):
        exporters.onnx.graph.export(
            checkpoint, tmp_path / "other", pattern=None, dtype="int8-qdq", codes=other
        )


def test_ranges_are_the_largest_magnitudes_of_all_segments(tiny_llama: Path) -> None:
    model = stock_model(tiny_llama)
    ids = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.down_proj"
    seen = qdq.observe(model, [name], ids)[name]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(_: object, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        calls.append((given[0], result))

    handle = model.get_submodule(name).register_forward_hook(remember)
    with torch.inference_mode():
        model(input_ids=ids)
    handle.remove()
    ((read, made),) = calls
    for found, values in ((seen.input, read), (seen.output, made)):
        array = values.double().numpy()
        largest = np.abs(array).max()
        assert found.largest == pytest.approx(largest, rel=1e-5)
        rounded = np.rint(array / (largest / 127)) * (largest / 127)
        error = ((rounded - array) ** 2).sum(axis=-1) / (array**2).sum(axis=-1)
        assert found.error == pytest.approx(error.mean(), rel=0.05)


def test_one_huge_activation_makes_a_tensor_unfit() -> None:
    values = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert qdq.lost(values, float(values.abs().max())) < qdq.WORST_ERROR
    values[0, 0] = 1000.0
    assert qdq.lost(values, 1000.0) > 0.9
    assert qdq.lost(torch.zeros(2, 3), 0.0) == 0.0


def test_convolutions_of_quantised_weights_compute_the_same(
    quantised: Path, tmp_path: Path
) -> None:
    names = [
        weight["name"] for weight in json.loads((quantised / "export.json").read_text())["weights"]
    ]
    after = tmp_path / "model.onnx"
    weights = {f"{name}.weight" for name in names}
    conv1x1.rewrite(quantised / "model.onnx", after, weights=weights, data="model.onnx.data")
    nodes = onnx.load(after, load_external_data=False).graph.node
    assert {node.name for node in nodes if node.op_type == "Conv"} == set(names)
    sessions = [
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (quantised / "model.onnx", after)
    ]
    feeds = {
        "input_ids": np.arange(10).reshape(2, 5),
        "attention_mask": np.ones((2, 5), np.int64),
        "position_ids": np.tile(np.arange(5), (2, 1)),
    }
    for entry in sessions[0].get_inputs()[3:]:
        feeds[entry.name] = np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float16)
    want, got = (session.run(["logits"], feeds)[0].astype(np.float32) for session in sessions)
    # A sum in another order may round an activation to the next int8 level.
    assert np.abs(want - got).max() <= 0.02 * np.ptp(want)
