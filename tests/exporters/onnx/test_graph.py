"""The ONNX graph: it computes what PyTorch does, and its record and its refusals are right.

The tests share the graphs that they look at, so they are in one long file.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import exporters.onnx.graph
from exporters.onnx import attention, judge, nbits, parity, trace
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.graph import Graph
from runtime.memory import HostMemory
from tests.conftest import MODEL_TYPES, VOCABULARY, Exported, MakeModel, stock_model
from thanos_deploy.errors import GateError, InputError, ModelError, UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.solver.grid import parse as parse_grid

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_exports_with_parity_names_and_the_pattern(
    exported_two_four: Exported, model_type: str
) -> None:
    folder = exported_two_four(model_type)
    pruned, checkpoint = folder / "model", Checkpoint.open(folder / "model")
    record = json.loads((folder / "onnx" / "export.json").read_text())
    cases = {case["name"]: case for case in record["parity"]}
    shapes = {(c["batch"], c["past"] > 0, c["sequence"] > 1) for c in cases.values()}
    assert {(1, False, True), (1, True, True), (1, True, False), (3, False, True)} <= shapes
    assert all(c["logits_error"] < 1e-5 and c["cache_error"] < 1e-5 for c in cases.values())

    graph = onnx.load(folder / "onnx" / "model.onnx")
    onnx.checker.check_model(str(folder / "onnx" / "model.onnx"))
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
    assert {p.key: p.value for p in graph.metadata_props} == {
        "thanos_deploy.pattern": "2:4",
        "thanos_deploy.dtype": "fp32",
        "thanos_deploy.max_sequence": "128",
        "thanos_deploy.logits": "all",
        "thanos_deploy.method": "thanos",
    }
    assert b"/site-packages/" not in (folder / "onnx" / "model.onnx").read_bytes()


def test_one_graph_runs_batches_lengths_and_pasts_that_it_was_not_exported_with(
    tiny_llama: Path, exported_llama: Path
) -> None:
    path = exported_llama / "onnx" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
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


def test_a_model_of_the_same_structure_is_not_traced_again_and_keeps_its_own_weights(
    tiny_llama: Path,
    exported_llama: Path,
    exported_two_four: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[str] = []
    really = trace._trace

    def counted(
        model: PreTrainedModel, logits: str, plan: attention.Plan | None = None
    ) -> ir.Model:
        traced.append(logits)
        return really(model, logits, plan)

    def files(folder: Path) -> tuple[bytes, ...]:
        names = ("model.onnx", "model.onnx.data", "export.json")
        return tuple((folder / name).read_bytes() for name in names)

    def export(name: str, model: Path) -> tuple[bytes, ...]:
        (tmp_path / name).mkdir()
        exporters.onnx.graph.export(Checkpoint.open(model), tmp_path / name, pattern=None)
        return files(tmp_path / name)

    before, pruned = files(exported_llama / "onnx"), exported_two_four("llama") / "model"
    # Of the pruned model's trace, the dense model's graph becomes what it was of another trace.
    monkeypatch.setattr(trace, "_trace", counted)
    monkeypatch.setattr(trace, "_traced", {})
    alone, dense = export("alone", pruned), export("dense", tiny_llama)
    assert traced == ["all"]
    assert dense == before
    assert export("alone again", pruned) == alone
    assert traced == ["all"]
    assert dense[0] == alone[0]
    assert dense[1] != alone[1]


def test_what_a_trace_depends_on_tells_graphs_apart(
    tiny_llama: Path, make_model: MakeModel
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e3}
    models = [load_model(tiny_llama), load_model(make_model(rope_parameters=rope))]
    models += [load_model(make_model(intermediate_size=64)), load_model(tiny_llama).half()]
    models += [load_model(make_model(tie_word_embeddings=False))]
    seen = [trace._structure(model, "all") for model in models]
    seen.append(trace._structure(models[0], "last"))
    assert len({*seen}) == len(seen)
    assert trace._structure(load_model(make_model()), "all") == seen[0]


def test_a_graph_of_the_last_logits_has_the_same_proof_and_says_what_it_cannot_do(
    tiny_llama: Path, exported_llama: Path, last_logits: Path
) -> None:
    record, whole = (
        json.loads((folder / "export.json").read_text())
        for folder in (last_logits, exported_llama / "onnx")
    )
    assert (record["logits"], whole["logits"]) == ("last", "all")
    assert [case["name"] for case in record["parity"]] == [case["name"] for case in whole["parity"]]
    assert all(c["logits_error"] < 1e-5 and c["cache_error"] < 1e-5 for c in record["parity"])
    session = ort.InferenceSession(last_logits / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch", 1, VOCABULARY]
    graph = Graph(session, ort, memory=HostMemory(), max_sequence=128)
    ids = torch.randint(VOCABULARY, (3, 20))
    with torch.no_grad():
        expected = stock_model(tiny_llama, dtype=torch.float32)(ids).logits.numpy()
    engine = OnnxRuntimeEngine(graph)
    np.testing.assert_allclose(engine.prefill(ids[:, :18].numpy()), expected[:, 17], atol=1e-5)
    for position in (18, 19):
        logits = engine.decode(ids[:, position].numpy())
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-5)
    with pytest.raises(InputError, match="--logits last") as caught:
        next(graph.read(ids[0].numpy()))
    assert "--logits all --overwrite" in caught.value.fix
    # The error of another model's logits is seen here too.
    other = stock_model(tiny_llama, dtype=torch.float32)
    other.model.layers[1].mlp.down_proj.weight.data[0] += 0.1
    cases = parity.compare(last_logits / "model.onnx", other, parity.LIMITS["fp32"])
    assert {case.first_differing for case in cases} == {"logits"}


def test_opt_with_norms_behind_projections_around_and_no_biases_has_parity(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The layout of OPT-350M; without a bias, products come as a Gemm of two inputs."""
    folder = make_model(
        "opt", do_layer_norm_before=False, word_embed_proj_dim=16, enable_bias=False
    )
    record = exporters.onnx.graph.export(Checkpoint.open(folder), tmp_path, pattern=None)
    assert max(case.logits_error for case in record.parity) < 1e-5
    assert {weight.input_axis for weight in record.weights} == {0}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_text_beyond_an_attention_window_is_read_as_in_torch(
    exported_two_four: Exported, model_type: str
) -> None:
    folder = exported_two_four(model_type)
    model = stock_model(folder / "model", dtype=torch.float32)
    assert model.config.sliding_window == 16
    path = folder / "onnx" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    engine = OnnxRuntimeEngine(Graph(session, ort, memory=HostMemory(), max_sequence=128))
    ids = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    np.testing.assert_allclose(engine.prefill(ids[:, :40].numpy()), expected[:, 39], atol=1e-4)
    for position in range(40, 60):
        logits = engine.decode(ids[:, position].numpy())
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-4)


def test_a_dense_model_is_not_exported_as_two_four(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"model.layers.0.self_attn.q_proj.weight does not hold 2:4"
    ):
        exporters.onnx.graph.export(
            Checkpoint.open(tiny_llama), tmp_path, pattern=SemiStructured(2, 4)
        )


def test_one_broken_group_is_enough_to_refuse_the_pattern(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    pruned = Path(shutil.copytree(exported_two_four("llama") / "model", tmp_path / "model"))
    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][5, 4:8] = 1.0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "onnx").mkdir()
    with pytest.raises(GateError, match=f"{name} does not hold 2:4") as caught:
        exporters.onnx.graph.export(
            Checkpoint.open(pruned), tmp_path / "onnx", pattern=SemiStructured(2, 4)
        )
    assert caught.value.exit_code == 6


def test_parity_is_measured_against_the_model_and_not_against_itself(
    tiny_llama: Path, exported_llama: Path
) -> None:
    path = exported_llama / "onnx" / "model.onnx"
    other = stock_model(tiny_llama, dtype=torch.float32)
    limit = parity.LIMITS["fp32"]
    fine = list(parity.compare(path, other, limit))
    assert all(case.first_differing is None for case in fine)
    other.model.layers[1].mlp.down_proj.weight.data[0] += 0.1
    cases = list(parity.compare(path, other, limit))
    assert min(case.logits_error for case in cases) > limit
    assert {case.first_differing for case in cases} == {"logits"}


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_the_first_tensor_that_differs_is_named(
    tiny_llama: Path, exported_llama: Path, tmp_path: Path, value: float
) -> None:
    graph = onnx.load(exported_llama / "onnx" / "model.onnx")
    for tensor in graph.graph.initializer:
        # The first output that this weight reaches is the key of the block after it.
        if tensor.name == "model.layers.0.mlp.up_proj.weight":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0, 0] += value
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, tmp_path / "model.onnx")
    model, limit = stock_model(tiny_llama, dtype=torch.float32), 1e-4
    cases = list(parity.compare(tmp_path / "model.onnx", model, limit))
    with pytest.raises(GateError, match=r"prefill .*present\.1\.key is the first output") as caught:
        parity.require(tmp_path / "model.onnx", cases, limit)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_widths_that_differ_from_block_to_block_are_taken_from_the_blocks(
    exported_shrunk: Exported, model_type: str
) -> None:
    folder = exported_shrunk(model_type)
    checkpoint = Checkpoint.open(folder / "model")
    heads = [width.kv_heads for width in checkpoint.widths]
    assert len(set(checkpoint.widths)) == 2
    record = json.loads((folder / "onnx" / "export.json").read_text())
    assert [block["heads"] for block in record["cache"]["blocks"]] == heads
    assert record["cache"]["bytes_per_token"] == sum(heads) * 2 * checkpoint.head_size * 4
    path = folder / "onnx" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.shape[1] for value in session.get_inputs()[3::2]] == heads
    assert max(max(c["logits_error"], c["cache_error"]) for c in record["parity"]) < 1e-5


def test_half_precision_is_compared_with_float32_and_written_without_negative_zeros(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = torch.tensor([-1e-9, 1e-9, -0.0, 2.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = exporters.onnx.graph.export(
        Checkpoint.open(folder), tmp_path, pattern=None, dtype="fp16"
    )
    assert record.dtype == "fp16"
    assert record.parity_limit == 5e-3
    worst = max(max(case.logits_error, case.cache_error) for case in record.parity)
    assert 1e-6 < worst < 5e-3  # not zero: it is half precision that was compared
    graph = onnx.load(tmp_path / "model.onnx").graph
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.name in tensors}
    assert floats.keys() == tensors.keys()
    assert {tensor.data_type for tensor in floats.values()} == {onnx.TensorProto.FLOAT16}
    up = onnx.numpy_helper.to_array(floats["model.layers.0.mlp.up_proj.weight"])
    assert up[:4, 0].tobytes() == np.array([0, 0, 0, 2], dtype=np.float16).tobytes()


def test_a_weight_that_half_precision_cannot_hold_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*1e\+06"):
        exporters.onnx.graph.export(Checkpoint.open(folder), tmp_path, pattern=None, dtype="fp16")


def test_a_weight_that_lost_its_name_is_a_missed_gate(
    tiny_llama: Path, exported_llama: Path, tmp_path: Path
) -> None:
    model = stock_model(tiny_llama, dtype=torch.float32)
    judge.require_names(exported_llama / "onnx" / "model.onnx", model)
    graph = onnx.load(exported_llama / "onnx" / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name == "model.layers.0.mlp.up_proj.weight":
            tensor.name = "stray"
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(GateError, match=r"mlp\.up_proj\.weight; matrices .* of the model: stray"):
        judge.require_names(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_int8_rounds_the_weights_keeps_zeros_and_computes_what_they_stand_for(
    exported_two_four: Exported, tmp_path: Path, model_type: str
) -> None:
    folder = exported_two_four(model_type)
    checkpoint = Checkpoint.open(folder / "model")
    record = exporters.onnx.graph.export(
        checkpoint, tmp_path, pattern=SemiStructured(2, 4), dtype="int8"
    )
    # With float32 activations, against PyTorch with the rounded weights.
    assert max(max(c.logits_error, c.cache_error) for c in record.parity) < 1e-5
    assert 0 < record.rounding["weights"] < 0.1
    assert 0 < record.rounding["activations"] < 0.2
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    in_model = load_file(folder / "model" / "model.safetensors")
    assert [weight.name for weight in record.weights] == list(linear_shapes(checkpoint))
    for weight in record.weights:
        dense = in_model[f"{weight.name}.weight"].numpy()
        dense = dense.T if checkpoint.family.transposed else dense
        outputs, inputs = dense.shape
        levels = tensors[f"{weight.name}.weight_Q8"].reshape(outputs, -1)[:, :inputs]
        scales = tensors[f"{weight.name}.weight_scales"].repeat(32, axis=1)[:, :inputs]
        assert ((levels == 128) >= (dense == 0)).all()
        rounded = (levels.astype(np.float32) - 128) * scales
        assert (np.abs(rounded - dense) <= 0.501 * scales).all()
        assert weight.pattern_holds
        assert weight.sparsity >= 0.5
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == len(record.weights)
    assert all(
        {"accuracy_level": 4}.items() <= {a.name: a.i for a in n.attribute}.items() for n in nodes
    )
    quantised = (tmp_path / "model.onnx.data").stat().st_size
    assert quantised < (folder / "onnx" / "model.onnx.data").stat().st_size


def test_polygraphy_finds_the_same_layers_two_four(
    exported_two_four: Exported, exported_llama: Path
) -> None:
    def found(path: Path) -> set[str]:
        command = Path(sys.executable).parent / "polygraphy"
        done = subprocess.run(
            [command, "inspect", "sparsity", path], capture_output=True, text=True, check=True
        )
        return set(re.findall(r"Found sparse tensor: (\S+)", done.stdout))

    folder = exported_two_four("llama") / "onnx"
    record = json.loads((folder / "export.json").read_text())
    names = {f"{weight['name']}.weight" for weight in record["weights"]}
    assert found(folder / "model.onnx") == names
    assert found(exported_llama / "onnx" / "model.onnx") == set()


@pytest.mark.parametrize("max_sequence", [0, 129])
def test_a_limit_that_the_model_does_not_take_is_refused(
    tiny_llama: Path, tmp_path: Path, max_sequence: int
) -> None:
    with pytest.raises(UsageError, match=f"--max-seq {max_sequence}: the model takes 1 to 128"):
        exporters.onnx.graph.export(
            Checkpoint.open(tiny_llama), tmp_path, pattern=None, max_sequence=max_sequence
        )


@pytest.mark.parametrize(
    "spelling", ["int4:16", "int4:16:asym", "int8", "int8:64:asym", "int8:row"]
)
def test_the_codes_of_a_quantised_model_are_those_of_the_file(
    tiny_llama: Path, tmp_path: Path, spelling: str
) -> None:
    """What the graph holds is the checkpoint's weight itself, and it computes what that does."""
    grid, onnx_folder = parse_grid(spelling), tmp_path / "onnx"
    for name in ("model", "codes", "onnx"):
        (tmp_path / name).mkdir()
    segments = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "codes"
    quantise_model(Checkpoint.open(tiny_llama), segments, tmp_path / "model", path, grid)
    checkpoint, codes = Checkpoint.open(tmp_path / "model"), Codes.open(path)
    record = exporters.onnx.graph.export(
        checkpoint, onnx_folder, pattern=None, dtype=f"int{grid.bits}", codes=codes
    )
    assert record.rounding["weights"] < 1e-5  # nothing is rounded again
    assert max(max(c.logits_error, c.cache_error) for c in record.parity) < 1e-5
    graph = onnx.load(onnx_folder / "model.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    in_model = load_file(tmp_path / "model" / "model.safetensors")
    for name in checkpoint.linears:
        weight = in_model[f"{name}.weight"].numpy()
        levels = nbits.levels(tensors, f"{name}.weight", weight.shape[1])
        scales = tensors[f"{name}.weight_scales"]
        steps = scales.repeat(grid.group or 128, axis=1)[:, : weight.shape[1]]
        np.testing.assert_allclose(levels * steps, weight, rtol=1e-6, atol=1e-7)
    wrong = "int8" if grid.bits == 4 else "int4"
    with pytest.raises(UsageError, match=f"{wrong} with a model that was quantised to {grid}"):
        exporters.onnx.graph.export(checkpoint, onnx_folder, pattern=None, dtype=wrong, codes=codes)


def test_int4_without_a_quantised_model_rounds(tiny_llama: Path, tmp_path: Path) -> None:
    record = exporters.onnx.graph.export(
        Checkpoint.open(tiny_llama), tmp_path, pattern=None, dtype="int4"
    )
    assert 1e-3 < record.rounding["weights"] < 0.5
    assert max(case.logits_error for case in record.parity) < 1e-5
