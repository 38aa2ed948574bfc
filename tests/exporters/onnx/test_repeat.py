"""A graph that was lengthened is the one that a whole trace gives."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import exporters.onnx.graph
from exporters.onnx import attention, repeat, trace
from tests.conftest import MakeModel
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model


def rows(graph: ir.Model) -> list[Any]:
    """All that a simplified graph computes, with numbers for the names that the exporter makes."""
    ends = {value.name for value in (*graph.graph.inputs, *graph.graph.outputs)}
    numbers: dict[int, int] = {}

    def say(value: ir.Value | None) -> object:
        if value is None or value.name in ends or (value.name or "").endswith(".weight"):
            return value and (value.name, str(value.shape))
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy().tobytes()
        return numbers.setdefault(id(value), len(numbers))

    return [
        (
            node.op_type,
            [say(value) for value in (*node.inputs, *node.outputs)],
            {name: str(attribute.value) for name, attribute in node.attributes.items()},
        )
        for node in graph.graph
    ]


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["neutral", "ort"])
def test_a_lengthened_graph_is_that_of_a_whole_trace(make_model: MakeModel, graph: str) -> None:
    model = load_model(make_model(num_hidden_layers=5))
    plan = attention.plan(model, 64) if graph == "ort" else None
    whole, lengthened = trace._trace(model, "all", plan), trace._whole(model, "all", plan)
    assert model.config.num_hidden_layers == 5
    assert len(model.model.layers) == 5
    found = []
    for traced in (whole, lengthened):
        bare = trace._without_weights(traced, model)
        complete = trace._with_weights(bare, model)
        trace.simplify(complete, model)
        assert [value.name for value in complete.graph.inputs][-2:] == [
            f"past_key_values.4.{part}" for part in ("key", "value")
        ]
        found.append(rows(complete))
    assert found[0] == found[1]


def test_blocks_that_cannot_be_continued_are_all_traced(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_model(num_hidden_layers=5))
    traced = []

    def count(model: Any, logits: str, plan: None) -> ir.Model:
        traced.append((len(model.model.layers), model.config.num_hidden_layers, logits))
        return ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

    monkeypatch.setattr(trace, "_trace", count)
    trace._whole(model, "last", None)
    assert traced == [(3, 3, "last"), (5, 5, "last")]


def chain(*changes: tuple[int, str]) -> ir.Model:
    """Three blocks that multiply the stream, each by its weight and by a factor that all share."""
    ends = [ir.Value(name="ids")]
    factor = ir.Value(name="factor")
    nodes: list[ir.Node] = []
    weights = [ir.Value(name=f"layers.{index}.weight") for index in range(3)]
    stream = ends[0]
    for index, weight in enumerate(weights):
        for other in (weight, factor):
            op_type = dict(changes).get(index, "Mul")
            nodes.append(ir.node(op_type, [stream, other], name=f"{index}.{len(nodes)}"))
            nodes[-1].metadata_props["pkg.torch.onnx.name_scopes"] = repr(
                ["", "layers", f"layers.{index}", "mul"]
            )
            stream = nodes[-1].outputs[0]
            stream.name = f"stream.{len(nodes)}"
    final = ir.node("Neg", [stream])
    graph = ir.Graph(
        ends, final.outputs, nodes=[*nodes, final], initializers=[], opset_imports={"": 20}
    )
    for value in (*weights, factor):
        graph.initializers[str(value.name)] = value
    return ir.Model(graph, ir_version=10)


def test_further_blocks_continue_the_stream_with_weights_of_their_own() -> None:
    model = chain()
    repeat.lengthen(model, "layers", 5)
    read = [[value.name for value in node.inputs if value] for node in model.graph]
    assert [names[1] for names in read[:-1]] == [
        name for index in range(5) for name in (f"layers.{index}.weight", "factor")
    ]
    made = [node.outputs[0].name for node in model.graph]
    assert [names[0] for names in read] == ["ids", *made[:-1]]
    assert len({*made}) == len(made)
    assert set(model.graph.initializers) == {"factor", *(f"layers.{i}.weight" for i in range(5))}


@pytest.mark.parametrize("index", [1, 2])
def test_a_block_of_another_kind_cannot_be_continued(index: int) -> None:
    with pytest.raises(repeat.NotRepeatingError, match="differ"):
        repeat.lengthen(chain((index, "Add")), "layers", 5)


@pytest.mark.parametrize(
    ("model_type", "sizes", "alike"),
    [
        ("llama", {"num_hidden_layers": 4}, True),
        ("llama", {"num_hidden_layers": 3}, False),  # all of them are traced anyway
        ("gemma2", {"num_hidden_layers": 4}, False),  # windows in every other block
    ],
)
def test_only_blocks_of_one_kind_are_alike(
    make_model: MakeModel, model_type: str, sizes: dict[str, int], alike: bool
) -> None:
    assert repeat.blocks_are_alike(load_model(make_model(model_type, **sizes))) == alike


def test_blocks_of_other_widths_are_not_alike(make_model: MakeModel) -> None:
    model = load_model(make_model(num_hidden_layers=4))
    mlp: Any = model.get_submodule("model.layers.2.mlp")
    for name, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16))):
        mlp.get_submodule(name).weight.data = torch.zeros(shape)
    assert not repeat.blocks_are_alike(model)


@pytest.mark.slow
def test_a_lengthened_graph_of_another_family_agrees_with_torch(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """GPT-2: products with biases, weights that are stored the other way round."""
    model = Checkpoint.open(make_model("gpt2", num_hidden_layers=5))
    record = exporters.onnx.graph.export(model, tmp_path, pattern=None)
    assert len(record.cache.blocks) == 5
    assert max(max(case.logits_error, case.cache_error) for case in record.parity) < 1e-5
