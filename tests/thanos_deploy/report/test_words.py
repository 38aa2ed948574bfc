from typing import Any

import pytest

from tests import bundles
from thanos_deploy.report import words

MODEL = {
    "method": "thanos",
    "quality": {"dense": 10.0, "pruned": 20.0, "ratio": 2.0},
    "graph_quality": None,
    "export": None,
    "linear_layers": {"pattern_holds": True},
    "widths": None,
    "bytes": {"model": {"dense": 100, "pruned": 100}},
}


@pytest.mark.parametrize(
    ("pattern", "holds", "said", "unsaid"),
    [
        ("2:4", True, "compute capability 8.0", "does not hold"),
        ("2:4", False, "does not hold in every row", "compute capability"),
        ("4:8", True, "No sparse tensor core takes 4:8", "compute capability"),
        ("unstructured:0.5", True, "No sparse tensor core takes unstructured:0.5", "2:4 brings"),
        ("structured:0.3", True, "the matrices keep their shapes", "tensor core"),
    ],
)
def test_the_verdict_promises_sparse_tensor_cores_only_where_they_apply(
    pattern: str, holds: bool, said: str, unsaid: str
) -> None:
    model = {**MODEL, "pattern": pattern, "linear_layers": {"pattern_holds": holds}}
    text = " ".join(words.verdict(model, bundles.run(factor=0.99, half=0.03)))
    assert said in text
    assert unsaid not in text
    assert (f"{pattern} brings no speed on a CPU" in text) == (pattern != "structured:0.3")
    assert "prefill-1x128 took 0.99x (0.96x to 1.02x)" in text
    assert "from 10.00 to 20.00" in text


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (0.90, "decode-1x128 takes 0.90x (0.88x to 0.92x) the time"),
        (0.99, "decode-1x128 shows no difference (0.97x to 1.01x the time)"),
        (1.10, "decode-1x128 takes 1.10x (1.08x to 1.12x) the time"),
    ],
)
def test_the_headline_claims_a_difference_only_where_the_interval_leaves_one_out(
    factor: float, said: str
) -> None:
    headline = words.headline({**MODEL, "pattern": "2:4"}, bundles.run(factor=factor))
    assert said in headline
    assert headline.startswith("2:4 with thanos: perplexity went from 10.00 to 20.00 (2.00x);")


def test_a_run_that_does_not_count_says_so_wherever_it_is_quoted() -> None:
    run = bundles.run(status="INVALID", reasons=("the machine moved",))
    model = {**MODEL, "pattern": "2:4"}
    assert "that run is INVALID" in words.headline(model, run)
    assert any("INVALID (the machine moved)" in line for line in words.verdict(model, run))


def test_what_was_not_measured_is_not_said_to_be_anything() -> None:
    model: dict[str, Any] = {**MODEL, "pattern": "2:4", "quality": None}
    headline = words.headline(model, None)
    assert "the perplexity was not measured" in headline
    assert "latency was not measured" in headline
    assert not any(
        "Measured" in line or "Perplexity" in line for line in words.verdict(model, None)
    )
