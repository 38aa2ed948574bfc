"""Logs as several generations of TensorRT write them, taken from public reports.

8.x: NVIDIA's developer guide and NVIDIA/TensorRT issue 1403; 10.x: issue 4056; counting:
the library of TensorRT-RTX 1.7 and public build logs of 10.14.
"""

import json

import pytest

from exporters.tensorrt import log as _buildlog
from exporters.tensorrt.log import Timing
from thanos_deploy.errors import InputError


@pytest.mark.parametrize(
    ("log", "eligible", "chosen", "counts"),
    [
        pytest.param(
            [
                "[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: "
                "conv1, conv2, conv3",
                "[03/23/2021-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse "
                "implementation for layers: conv2, conv3",
            ],
            {"conv1", "conv2", "conv3"},
            {"conv2", "conv3"},
            (3, 2),
            id="8.x",
        ),
        pytest.param(
            [
                "[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0",
                "[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for "
                "layers:",
            ],
            {"Conv_0"},
            set(),
            (1, 0),
            id="8.0, none picked",
        ),
        pytest.param(
            [
                "[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: "
                "MatMul_401, Conv_619 + Relu_620",
                "[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse "
                "implementation for layers: Conv_619 + Relu_620",
            ],
            {"MatMul_401", "Conv_619", "Relu_620"},
            {"Conv_619", "Relu_620"},
            (2, 1),
            id="10.x, fused layers",
        ),
        pytest.param(
            [
                "[I] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: h.0.fc1, h.0.fc2",
                "[I] (Sparsity) Chose 1 layer(s) using sparse tactics: h.0.fc2",
            ],
            {"h.0.fc1", "h.0.fc2"},
            {"h.0.fc2"},
            (2, 1),
            id="11.x",
        ),
        pytest.param(
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            set(),
            set(),
            (39, 0),
            id="only counted",
        ),
        pytest.param(["[I] Detected 3 inputs"], set(), set(), (None, None), id="not a word"),
        pytest.param(
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
                "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b",
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
                "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
            ],
            {"a", "b"},
            set(),
            (2, 0),
            id="the last selection is the engine's",
        ),
    ],
)
def test_sparsity_lines_of_every_generation(
    log: list[str], eligible: set[str], chosen: set[str], counts: tuple[int | None, int | None]
) -> None:
    lines = _buildlog.sparsity_lines(log)
    assert lines.eligible == eligible
    assert lines.chosen == chosen
    assert (lines.eligible_count, lines.chosen_count) == counts


def test_the_fastest_dense_and_sparse_kernel_of_each_layer() -> None:
    log = [
        "[V] --------------- Timing Runner: up + gate_myl0_3 (CaskGemm[0x80000009])",
        "[V] Tactic Name: sm80_xmma_gemm_f16f16 Tactic: 0x1ba7 Time: 0.020",
        "[V] Tactic Name: sm80_xmma_gemm_f16f32 Tactic: 0x1ba8 Time: 0.025",
        "[V] Tactic Name: sm80_xmma_sparse_gemm_f16f16 Tactic: 0x1ba9 Time: 0.0125",
        "[V] --------------- Timing Runner: down [profile 1] (CaskConvolution)",
        "[V] down (CaskConvolution) Set Tactic Name: sm80_spgemm_h Tactic: 77",
        "[V] Tactic: 77 time 0.5",
        "[V] --------------- Timing Runner: down (CaskConvolution)",
        "[V] Tactic Name: sm80_spgemm_h Tactic: 0x1ba7 Time: 0.75",
        "[V] --------------- Timing Runner: norm (Reduce)",
        "[V] Tactic: 1 time 0.25",
        "[V] Fastest Tactic: 0x1 Time: 0.25",
    ]
    assert _buildlog.timings(log) == {
        "up": Timing(2e-5, 1.25e-5),
        "gate": Timing(2e-5, 1.25e-5),
        "down": Timing(None, 5e-4),
        "norm": Timing(2.5e-4, None),
    }


def test_layers_are_the_same_from_the_inspector_and_from_the_log() -> None:
    gemm = {
        "Name": "q+k_myl1_9",
        "LayerType": "gemm",
        "TacticName": "sm80_xmma_sparse_gemm_f16",
        "Metadata": "[ONNX Layer: q]\u001e[ONNX Layer: k]",
    }
    conv = {
        "Name": "up",
        "LayerType": "CaskConvolution",
        "HasSparseWeights": 1,
        "TacticName": "sm70_xmma_fprop_conv1x1",
        "Metadata": "",
    }
    inspected = _buildlog.inspected_layers(json.dumps({"Layers": [gemm, conv], "Bindings": []}))
    listed = _buildlog.listed_layers(
        [
            "[V] Layers:",
            "[V] Name: q+k_myl1_9, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1] }], "
            "TacticName: sm80_xmma_sparse_gemm_f16, StreamId: 0, "
            "Metadata: [ONNX Layer: q][ONNX Layer: k]",
            "Name: up, LayerType: CaskConvolution, HasSparseWeights: 1, "
            "TacticName: sm70_xmma_fprop_conv1x1, StreamId: 0, Metadata: ",
            "[V] Name: logits, IOMode: Output, DataType: Half",
        ]
    )
    assert inspected == listed
    assert [layer.nodes for layer in listed] == [{"q", "k"}, {"up"}]
    # That weights are sparse does not make the kernel sparse.
    assert [layer.sparse for layer in listed] == [True, False]


def test_a_kernel_that_is_chosen_later_has_no_name() -> None:
    line = "Name: a_myl0_1, LayerType: gemm, TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata:"
    (layer,) = _buildlog.listed_layers([line])
    assert layer.kernel == ""
    assert not layer.sparse
    assert layer.nodes == {"a"}


def test_an_engine_without_detail_shows_only_names() -> None:
    assert _buildlog.inspected_layers(json.dumps({"Layers": ["a", "b"]})) == []


@pytest.mark.parametrize(
    "text",
    ['{"Layers": [{"Name": "a", "Metadata": "[ONpe": }]}', "{}", "[]", '{"Layers": [{}]}',
     '{"Layers": [{"Name": 1}]}', '{"Layers": [{"Name": "a", "TacticName": null}]}',
     '{"Layers": 1}', "[" * 100_000],
    ids=["cut", "empty", "list", "no name", "number", "null", "no list", "deep"],
)  # fmt: skip
def test_a_damaged_inspection_is_refused(text: str) -> None:
    """The first was found by fuzzing."""
    with pytest.raises(InputError, match="engine inspector"):
        _buildlog.inspected_layers(text)


def test_numbers_that_are_none_are_passed_over() -> None:
    """Found by fuzzing."""
    log = ["--- Timing Runner: a (X[0x1])", "Tactic: 0x1 Time: ..01", "Tactic: 0x1 Time: 2.5"]
    assert _buildlog.timings(log) == {"a": Timing(0.0025, None)}
    counted = f"(Sparsity) Found {'9' * 5000} layer(s) eligible to use sparse tactics"
    assert _buildlog.sparsity_lines([counted]).eligible_count is None
