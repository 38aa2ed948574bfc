import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

import exporters.onnx
from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel, stock_model
from thanos_deploy.checkpoint import Checkpoint
from thanos_deploy.errors import GateError
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.prune import linear_shapes, prune


def prune_to_two_four(folder: Path, out: Path) -> Path:
    out.mkdir()
    segments = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))
    prune(
        Checkpoint.open(folder),
        segments,
        out,
        pattern=SemiStructured(2, 4),
        method="thanos",
        options={"block_columns": 16},
    )
    return out


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_exports_with_parity_names_and_the_pattern(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    pruned = prune_to_two_four(make_model(model_type), tmp_path / "model")
    checkpoint = Checkpoint.open(pruned)
    (tmp_path / "onnx").mkdir()
    record = exporters.onnx.export(checkpoint, tmp_path / "onnx", pattern=SemiStructured(2, 4))
    assert json.loads((tmp_path / "onnx" / "export.json").read_text()) == json.loads(
        json.dumps(record)
    )
    cases = {case["name"]: case for case in record["parity"]}
    shapes = {(c["batch"], c["past"] > 0, c["sequence"] > 1) for c in cases.values()}
    assert {(1, False, True), (1, True, True), (1, True, False), (3, False, True)} <= shapes
    assert all(c["logits_error"] < 1e-5 and c["cache_error"] < 1e-5 for c in cases.values())

    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    in_file = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer
    }
    in_model = load_file(pruned / "model.safetensors")
    names = linear_shapes(checkpoint)
    assert [weight["name"] for weight in record["weights"]] == list(names)
    for weight in record["weights"]:
        array = in_file[f"{weight['name']}.weight"]
        array = array if weight["input_axis"] == 1 else array.T
        stored = in_model[f"{weight['name']}.weight"].numpy()
        np.testing.assert_array_equal(array, stored.T if checkpoint.family.transposed else stored)
        assert ((array != 0).reshape(-1, 4).sum(axis=1) == 2).all()
        assert weight["pattern_holds"]
        assert weight["sparsity"] == 0.5
    assert {p.key: p.value for p in graph.metadata_props} == {"thanos_deploy.pattern": "2:4"}
    assert b"/site-packages/" not in (tmp_path / "onnx" / "model.onnx").read_bytes()


def test_one_graph_runs_batches_lengths_and_pasts_that_it_was_not_exported_with(
    tiny_llama: Path, tmp_path: Path
) -> None:
    exporters.onnx.export(Checkpoint.open(tiny_llama), tmp_path, pattern=None)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model = stock_model(tiny_llama, dtype=torch.float32)
    assert [value.name for value in session.get_inputs()][:3] == [
        "input_ids",
        "attention_mask",
        "position_ids",
    ]
    past = [value.name for value in session.get_inputs()[3:]]
    assert past == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    for batch, lengths in ((1, (1, 1, 1)), (5, (17, 1, 9)), (2, (64, 30))):
        ids = torch.randint(VOCABULARY, (batch, sum(lengths)))
        with torch.no_grad():
            expected = model(ids).logits.numpy()
        cache = [np.zeros((batch, 2, 0, 8), dtype=np.float32)] * 4
        done = 0
        for length in lengths:
            positions = np.arange(done, done + length)[None].repeat(batch, axis=0)
            logits, *cache = session.run(
                None,
                {
                    "input_ids": ids[:, done : done + length].numpy(),
                    "attention_mask": np.ones((batch, done + length), dtype=np.int64),
                    "position_ids": positions,
                    **dict(zip(past, cache, strict=True)),
                },
            )
            np.testing.assert_allclose(
                logits, expected[:, done : done + length], atol=1e-5, rtol=1e-4
            )
            done += length


def test_a_dense_model_is_not_exported_as_two_four(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"model.layers.0.self_attn.q_proj.weight does not hold 2:4"
    ):
        exporters.onnx.export(Checkpoint.open(tiny_llama), tmp_path, pattern=SemiStructured(2, 4))


def test_one_broken_group_is_enough_to_refuse_the_pattern(
    make_model: MakeModel, tmp_path: Path
) -> None:
    pruned = prune_to_two_four(make_model("llama"), tmp_path / "model")
    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][5, 4:8] = 1.0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "onnx").mkdir()
    with pytest.raises(GateError, match=f"{name} does not hold 2:4") as caught:
        exporters.onnx.export(
            Checkpoint.open(pruned), tmp_path / "onnx", pattern=SemiStructured(2, 4)
        )
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_difference_beyond_the_limit_is_a_missed_gate(error: float) -> None:
    fine = exporters.onnx.ParityCase("prefill", 1, 0, 7, 1e-6, 1e-6)
    exporters.onnx._require_parity(Path("model.onnx"), [fine])
    for broken, what in (
        (replace(fine, logits_error=error), "logits"),
        (replace(fine, cache_error=error), "kv cache"),
    ):
        with pytest.raises(GateError, match=f"prefill .*{what} differ"):
            exporters.onnx._require_parity(Path("model.onnx"), [fine, broken])


def test_parity_is_measured_against_the_model_and_not_against_itself(
    tiny_llama: Path, tmp_path: Path
) -> None:
    exporters.onnx.export(Checkpoint.open(tiny_llama), tmp_path, pattern=None)
    other = stock_model(tiny_llama, dtype=torch.float32)
    other.model.layers[1].mlp.down_proj.weight.data[0] += 0.1
    cases = list(exporters.onnx._compare(tmp_path / "model.onnx", other))
    assert min(case.logits_error for case in cases) > exporters.onnx.PARITY_LIMIT
