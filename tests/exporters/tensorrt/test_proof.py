from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.tensorrt import proof as _proof
from exporters.tensorrt.log import EngineLayer, SparsityLines, Timing
from thanos_deploy.bundle.engine_record import LayerProof
from thanos_deploy.model.verdict import judge
from thanos_deploy.pattern import SemiStructured

SILENCE = SparsityLines(frozenset(), frozenset(), None, None)
FAST = "sm80_xmma_sparse_gemm_f16f16"


def two_four(outputs: int, inputs: int, dtype: type = np.float16) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.ones((outputs, inputs), dtype=dtype)
    values[:, 0::4] = values[:, 1::4] = 0
    return values


def verdict(
    values: np.ndarray[Any, Any],
    lines: SparsityLines = SILENCE,
    timing: Timing | None = None,
    layers: tuple[EngineLayer, ...] = (),
    *,
    sparse_allowed: bool = True,
    kernels_known: bool = True,
) -> LayerProof:
    (proof,) = _proof.prove(
        [_proof.weight("up", values)],
        lines,
        {"up": timing} if timing else {},
        layers,
        sparse_allowed=sparse_allowed,
        kernels_known=kernels_known,
    )
    return proof


@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_a_weight_holds_two_four_exactly_where_the_pattern_is_judged_to_hold(
    rows: int, cols: int, seed: int
) -> None:
    nonzero = np.random.default_rng(seed).random((rows, cols)) < 0.3
    seen = _proof.weight("w", nonzero.astype(np.float32))
    assert seen.holds == judge(nonzero, SemiStructured(2, 4)).holds


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (two_four(8, 16)[:, :15], "15 inputs do not divide into groups of 4"),
        (np.ones((8, 16), np.float16), "32 of 32 groups of 4 inputs keep more than 2"),
        (two_four(8, 16, np.float32), "fp32: sparse kernels are for fp16, bf16, int8 and fp8"),
        (two_four(8, 12), "8 x 12: sparse kernels want multiples of 8 x 16"),
        (two_four(7, 16), "7 x 16: sparse kernels want multiples of 8 x 16"),
    ],
)
def test_what_is_not_eligible_says_why(values: np.ndarray[Any, Any], reason: str) -> None:
    proof = verdict(values)
    assert (proof.verdict, proof.reason) == ("not eligible", reason)


def test_a_sparse_kernel_in_one_profile_is_picked() -> None:
    layers = (
        EngineLayer("up_myl0_1", "gemm", "sm80_xmma_gemm", False, frozenset({"up"})),
        EngineLayer("up+gate_myl1_1", "gemm", FAST, True, frozenset({"up", "gate"})),
    )
    proof = verdict(two_four(8, 16), layers=layers)
    assert (proof.verdict, proof.reason) == ("picked", f"kernel {FAST}")
    assert proof.engine_layer == "up+gate_myl1_1 (gemm)"


def test_the_log_alone_is_enough_for_picked() -> None:
    lines = SparsityLines(frozenset({"up"}), frozenset({"up"}), 1, 1)
    assert verdict(two_four(8, 16), lines).verdict == "picked"


def test_eligible_says_how_much_faster_the_dense_kernel_was() -> None:
    lines = SparsityLines(frozenset({"up"}), frozenset(), 1, 0)
    proof = verdict(two_four(8, 16), lines, Timing(dense=2e-5, sparse=2.35e-5))
    assert proof.verdict == "eligible"
    assert proof.reason == (
        "the fastest dense kernel took 20.0 us, the fastest sparse one 3.5 us more"
    )
    kept = "TensorRT tried sparse kernels and kept a dense one"
    assert verdict(two_four(256, 512), lines).reason == kept
    small = verdict(two_four(8, 512), lines).reason
    assert small == f"{kept}, as is usual below 256 inputs or outputs"


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [
        (2, (), "eligible"),
        (1, (), "not reported"),
        # One layer of the engine multiplies both weights.
        (1, (EngineLayer("q+k", "gemm", "", False, frozenset({"q", "k"})),), "eligible"),
        (0, (), "not reported"),
    ],
)
def test_a_log_that_only_counts_says_something_only_if_it_counts_every_layer_with_the_pattern(
    count: int, layers: tuple[EngineLayer, ...], expected: str
) -> None:
    weights = {"q": two_four(8, 16), "k": two_four(8, 16), "up": np.ones((8, 16), np.float16)}
    q, k, up = _proof.prove(
        [_proof.weight(name, values) for name, values in weights.items()],
        SparsityLines(frozenset(), frozenset(), count, 0),
        {},
        layers,
        sparse_allowed=True,
        kernels_known=True,
    )
    assert (q.verdict, k.verdict, up.verdict) == (expected, expected, "not eligible")
    if count and expected == "not reported":
        assert q.reason.endswith("counts 1 eligible layers without names, and 2 hold the pattern")


def test_silence_is_not_taken_for_an_answer() -> None:
    assert verdict(two_four(8, 16)).verdict == "not reported"
    later = verdict(two_four(8, 16), kernels_known=False)
    assert later.reason == "kernels are chosen when the engine is loaded on its GPU"
    off = verdict(two_four(8, 16), sparse_allowed=False)
    assert off.reason == "the engine was built without allowing sparse weights"
