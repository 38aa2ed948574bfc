"""ONNX Runtime's attention in a graph: what its kernel does, which models it fits, and parity."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import exporters.onnx.graph
from exporters.onnx import attention
from exporters.onnx.rotary import Rotation
from tests.conftest import Exported, MakeModel
from thanos_deploy.bundle.graph_record import read_graph_record
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model

HEADS, SHARED, DIM, ROOM = 6, 2, 16, 48

Floats = NDArray[np.float32]


def operator(**attributes: Any) -> ort.InferenceSession:
    """A graph of one GroupQueryAttention."""
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    types = [TensorProto.FLOAT] * 5 + [TensorProto.INT32] * 2
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=SHARED,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(*pair, None) for pair in zip(names, types, strict=True)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def attended(
    queries: Floats, keys: Floats, values: Floats, window: int, softcap: float
) -> NDArray[np.float64]:
    """Brute force in float64: of queries [s, heads, dim] behind keys [t, shared, dim]."""
    out = np.zeros(queries.shape)
    for row, head in np.ndindex(queries.shape[:2]):
        place = len(keys) - len(queries) + row
        seen = slice(max(0, place - window + 1), place + 1)
        shared = head // (HEADS // SHARED)
        scores = keys[seen, shared].astype(float) @ queries[row, head] / 4
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        odds = np.exp(scores - scores.max())
        out[row, head] = odds @ values[seen, shared] / odds.sum()
    return out


@pytest.mark.parametrize(
    ("before", "new"),
    [
        ([0], [20]),  # a prompt
        ([0, 0, 0], [7, 20, 1]),  # prompts of unequal lengths
        ([9, 40, 1], [1, 1, 1]),  # a step
        ([0, 30], [1, 1]),  # a step of which one row has nothing yet
        ([19], [12]),  # more of a prompt
    ],
)
@pytest.mark.parametrize("window", [1000, 5])
def test_the_kernel_appends_to_rows_of_any_length_in_place(
    before: list[int], new: list[int], window: int
) -> None:
    draw = np.random.default_rng(0)
    batch, longest, softcap = len(new), max(new), 2.0
    session = operator(
        scale=1 / 4, softcap=softcap, **({"local_window_size": window} if window < 1000 else {})
    )
    # What is nobody's may be anything.
    caches = [np.full((batch, SHARED, ROOM, DIM), np.nan, np.float32) for _ in "kv"]
    for cache in caches:
        for row, length in enumerate(before):
            cache[row, :, :length] = draw.standard_normal((SHARED, length, DIM))
    q, k, v = (
        draw.standard_normal((batch, longest, heads, DIM)).astype(np.float32)
        for heads in (HEADS, SHARED, SHARED)
    )
    expected = []
    for row, (length, count) in enumerate(zip(before, new, strict=True)):
        keys, values = (
            np.concatenate([cache[row, :, :length].swapaxes(0, 1), more[row, :count]])
            for cache, more in zip(caches, (k, v), strict=True)
        )
        wanted = attended(q[row, :count], keys, values, window, softcap)
        expected.append((wanted, (keys, values)))
    total = max(sum(pair) for pair in zip(before, new, strict=True))
    binding = session.io_binding()
    last = np.add(before, new).astype(np.int32) - 1
    flat = {name: one.reshape(batch, longest, -1) for name, one in (("q", q), ("k", k), ("v", v))}
    for name, array in {**flat, "last": last, "total": np.array([total], np.int32)}.items():
        binding.bind_cpu_input(name, array)
    for part, cache in zip("kv", caches, strict=True):
        place = ("cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        binding.bind_input(f"past_{part}", *place)
        binding.bind_output(f"present_{part}", *place)
    binding.bind_output("out", "cpu")
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[-1].numpy().reshape(batch, longest, HEADS, DIM)
    for row, (wanted, own) in enumerate(expected):
        np.testing.assert_allclose(out[row, : new[row]], wanted, atol=1e-5)
        for cache, kept in zip(caches, own, strict=True):
            np.testing.assert_array_equal(cache[row, :, : len(kept)].swapaxes(0, 1), kept)


def test_what_it_cannot_do_is_still_so() -> None:
    """Were more of several prompts read together, `runtime.in_place` could do that too."""
    session = operator()
    cache = np.zeros((2, SHARED, ROOM, DIM), np.float32)
    feeds = {
        "q": np.zeros((2, 3, HEADS * DIM), np.float32),
        **dict.fromkeys("kv", np.zeros((2, 3, SHARED * DIM), np.float32)),
        "past_k": cache,
        "past_v": cache,
        "last": np.array([6, 5], np.int32),
        "total": np.array([7], np.int32),
    }
    with pytest.raises(Exception, match="batch_size must be 1"):
        session.run(None, feeds)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2", "glm4"])
def test_a_graph_with_it_computes_what_the_model_does(
    exported_ort: Exported, model_type: str
) -> None:
    """Heads that share keys, learned positions, windows with a cap, and pairs of neighbours."""
    folder = exported_ort(model_type) / "onnx"
    record = read_graph_record(folder / "export.json")
    assert (record.graph, record.neutral_because) == ("ort", None)
    assert {case.name for case in record.parity} >= {"padded batch", "decode of that batch"}
    assert all(max(case.logits_error, case.cache_error) < 1e-6 for case in record.parity)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert "Softmax" not in kinds
    rotates = {
        attribute.i
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "do_rotary"
    }
    assert rotates == (set() if model_type == "opt" else {1})


@pytest.mark.parametrize(
    ("model_type", "windows", "rotations", "sizes"),
    [
        ("llama", (None, None), 2 * (Rotation(0, False),), {"hidden_size": 64}),
        ("llama", (None, None), (None, None), {}),  # 8 channels: too few for its tables
        ("opt", (None, None), (None, None), {}),
        ("mistral", (5, 5), (None, None), {"sliding_window": 5}),
        ("gemma2", (16, None), 2 * (Rotation(0, False),), {"head_dim": 16}),
        (
            "gemma3_text",
            (16, None),
            (Rotation(0, False), Rotation(1, False)),
            {"head_dim": 16},
        ),
        ("smollm3", (None, None), (Rotation(0, False), None), {"hidden_size": 64}),
        ("glm4", (None, None), 2 * (Rotation(0, True),), {"head_dim": 32}),
    ],
)
def test_a_plan_is_what_the_model_was_seen_to_do(
    make_model: MakeModel,
    model_type: str,
    windows: tuple[int | None, ...],
    rotations: tuple[Rotation | None, ...],
    sizes: dict[str, object],
) -> None:
    model = load_model(make_model(model_type, **sizes))
    before = model.config._attn_implementation
    plan = attention.plan(model, 64)
    assert (plan.windows, plan.rotations) == (windows, rotations)
    assert all(cos.shape[0] == 64 and cos.shape == sin.shape for cos, sin in plan.tables)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("qwen3", {}, "its heads have 12 channels, which is not a multiple of 8"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                }
            },
            "depends on the longest text in a batch",
        ),
    ],
)
def test_where_it_does_not_fit_the_graph_is_neutral_and_says_why(
    make_model: MakeModel, model_type: str, sizes: dict[str, object], reason: str
) -> None:
    model = load_model(make_model(model_type, **sizes))
    plan, unfit = exporters.onnx.graph._plan(model, "fp32", 64)
    assert plan is None
    assert unfit is not None
    assert reason in unfit


def test_attention_of_another_kind_does_not_fit(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    assert exporters.onnx.graph._plan(model, "fp16", 64)[1] == (
        "fp16 is for GPUs, and ONNX Runtime's attention is used on CPUs"
    )

    def blockwise(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query // 8 == key // 8) & (key <= query)

    with pytest.raises(attention.UnfitError, match="neither causal nor"):
        attention._window(blockwise, 64)


@pytest.mark.slow
def test_a_quantised_graph_has_one_set_of_codes_for_embedding_and_head(
    make_model: MakeModel, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_model(hidden_size=64))
    record = exporters.onnx.graph.export(
        checkpoint, tmp_path, pattern=None, dtype="int4", graph="ort"
    )
    # Against PyTorch with the rounded weights, those of the embedding and the head included.
    assert max(max(c.logits_error, c.cache_error) for c in record.parity) < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == len(record.weights) + 1
    assert kinds.count("GatherBlockQuantized") == 1
    assert "MatMul" not in kinds
    codes = next(one for one in graph.initializer if one.name == "model.embed_tokens.weight_Q8")
    assert list(codes.dims) == [257, 2, 32]


@pytest.mark.slow
def test_a_graph_that_stays_neutral_is_recorded_with_the_reason(
    make_model: MakeModel, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_model("qwen3"))
    record = exporters.onnx.graph.export(checkpoint, tmp_path, pattern=None, graph="ort")
    assert record.graph == "neutral"
    assert record.neutral_because is not None
    assert "12 channels" in record.neutral_because
