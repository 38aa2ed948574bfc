from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from exporters.onnx import simplify
from tests.conftest import Exported
from thanos_deploy.model.checkpoint import Checkpoint

HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
GENERATOR = np.random.default_rng(0)


def rewrite(text: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A graph as it is written here, and as the rewrites leave it."""
    before = onnx.parser.parse_model(HEAD + text)
    model = ir.from_proto(before)
    simplify.apply(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return before, after


def run(model: onnx.ModelProto, **feeds: NDArray[np.generic]) -> NDArray[np.floating]:
    results: list[NDArray[np.floating]] = ReferenceEvaluator(model).run(None, feeds)  # type: ignore[assignment]
    return results[0]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(str(node.op_type) for node in model.graph.node if node.op_type != "Constant")


@pytest.mark.parametrize("product", ["Mul (x, turned)", "Mul (turned, x)"])
def test_a_product_with_a_reciprocal_root_becomes_a_quotient(product: str) -> None:
    before, after = rewrite(
        f"""g (float[2, 4] x, float[2, 1] square) => (float[2, 4] y) {{
            root = Sqrt (square)
            turned = Reciprocal (root)
            y = {product}
        }}"""
    )
    assert operators(after) == Counter(Div=1, Sqrt=1)
    feeds = {
        "x": GENERATOR.standard_normal((2, 4), np.float32),
        "square": GENERATOR.random((2, 1), np.float32),
    }
    np.testing.assert_allclose(run(after, **feeds), run(before, **feeds), rtol=1e-6)


# Two heads of keys, each for three heads of queries; nothing else has the same size as another.
REPEAT = """
            {name}_slice = Slice ({name}, zero, most, axis0, one)
            {name}_apart = Unsqueeze ({name}_slice, axis2)
            {name}_many = Expand ({name}_apart, copies)
            {name}_all = Reshape ({name}_many, flat)
"""
CONSTANTS = """
            zero = Constant <value = int64[1] {0}> ()
            one = Constant <value = int64[1] {1}> ()
            most = Constant <value = int64[1] {9223372036854775807}> ()
            axis0 = Constant <value = int64[1] {0}> ()
            axis2 = Constant <value = int64[1] {2}> ()
            copies = Constant <value = int64[5] {5, 2, 3, 7, 8}> ()
            flat = Constant <value = int64[4] {5, 6, 7, 8}> ()
"""


@pytest.mark.parametrize("rows", [1, 4])
def test_queries_of_a_group_are_multiplied_with_one_key(rows: int) -> None:
    before, after = rewrite(
        f"""g (float[b, 6, s, 8] queries, float[b, 2, t, 8] keys) => (float[b, 6, s, t] scores) {{
            {CONSTANTS}{REPEAT.format(name="keys")}
            turned = Transpose <perm = [0, 1, 3, 2]> (keys_all)
            scores = MatMul (queries, turned)
        }}"""
    )
    assert operators(after) == Counter(Reshape=2, Transpose=1, MatMul=1)
    feeds = {
        "queries": GENERATOR.standard_normal((5, 6, rows, 8), np.float32),
        "keys": GENERATOR.standard_normal((5, 2, 7, 8), np.float32),
    }
    np.testing.assert_allclose(run(after, **feeds), run(before, **feeds), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_weights_of_a_group_are_multiplied_with_one_value(rows: int) -> None:
    before, after = rewrite(
        f"""g (float[b, 6, s, t] weights, float[b, 2, t, 8] values) => (float[b, 6, s, 8] read) {{
            {CONSTANTS}{REPEAT.format(name="values")}
            read = MatMul (weights, values_all)
        }}"""
    )
    assert operators(after) == Counter(Reshape=2, MatMul=1)
    feeds = {
        "weights": GENERATOR.standard_normal((5, 6, rows, 7), np.float32),
        "values": GENERATOR.standard_normal((5, 2, 7, 8), np.float32),
    }
    np.testing.assert_allclose(run(after, **feeds), run(before, **feeds), atol=1e-5)


def test_heads_of_unknown_number_are_left_alone() -> None:
    before, after = rewrite(
        f"""g (float[b, h, s, t] weights, float[b, 2, t, 8] values) => (float[b, h, s, 8] read) {{
            {CONSTANTS}{REPEAT.format(name="values")}
            read = MatMul (weights, values_all)
        }}"""
    )
    assert operators(before) - operators(after) == Counter(Slice=1)


# The parser takes the bits of a float16: those of -65504 are 0xfbff.
def test_a_row_that_sees_nothing_stays_finite_in_half_precision() -> None:
    before, after = rewrite(
        """g (float16[1, 3] scores, bool[2, 3] visible) => (float16[2, 3] weights) {
            zero = Constant <value = float16[1] {0}> ()
            lowest = Constant <value = float16[1] {64511}> ()
            mask = Where (visible, zero, lowest)
            masked = Add (scores, mask)
            weights = Softmax <axis = -1> (masked)
        }"""
    )
    feeds = {
        "scores": np.array([[-100, -200, -50]], np.float16),
        "visible": np.array([[False, False, False], [True, False, True]]),
    }
    with np.errstate(all="ignore"):
        assert np.isnan(run(before, **feeds)[0]).all()
    weights = run(after, **feeds)
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(weights[1], [0, 0, 1])


def test_another_constant_is_no_mask() -> None:
    before, after = rewrite(
        """g (bool[3] visible) => (float[3] y) {
            zero = Constant <value = float[1] {0.0}> ()
            other = Constant <value = float[1] {-1000.0}> ()
            y = Where (visible, zero, other)
        }"""
    )
    visible = np.array([True, False, True])
    np.testing.assert_array_equal(run(after, visible=visible), run(before, visible=visible))


# RMS norms of a block; Qwen3 and Gemma 3 have two more for queries and keys, and ONNX Runtime
# leaves two of Gemma 3's alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 4), ("gemma", 2), ("gemma2", 4)],
)
def test_onnx_runtime_fuses_every_norm_and_copies_no_key(
    exported_two_four: Exported, tmp_path: Path, model_type: str, fused: int
) -> None:
    folder = exported_two_four(model_type)
    blocks = len(Checkpoint.open(folder / "model").widths)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = folder / "onnx" / "model.onnx"
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    running = operators(onnx.load(tmp_path / "optimised.onnx", load_external_data=False))
    assert running["SimplifiedLayerNormalization"] == fused * blocks + 1
    assert running["Reciprocal"] == running["IsNaN"] == 0
    written = onnx.load(path, load_external_data=False)
    assert {node.domain for node in written.graph.node} == {""}
    masks = operators(written)["GatherND"]
    assert operators(written)["Expand"] == 3 * masks
