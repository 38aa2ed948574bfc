"""What a budget is, and what its choices are in words."""

from math import nan
from typing import Any

import pytest

from thanos_deploy.errors import UsageError
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.budget import (
    Budget,
    Choice,
    Choices,
    decision_cells,
    decision_rows,
    joined,
    ranges,
)
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.stages.request import PruneRequest

TWO_FOUR = SemiStructured(2, 4)

GROUPS = (
    Choice(("m.0.mlp.gate", "m.0.mlp.up"), 2e-6, 0.5, dense=True),
    Choice(("m.0.mlp.down",), 0.0, 0.25, dense=True),
    Choice(("m.1.mlp.gate", "m.1.mlp.up"), 2e-6, 0.125, dense=False),
    Choice(("m.1.mlp.down",), 0.0, 0.5, dense=True),
    Choice(("m.2.mlp.gate", "m.2.mlp.up"), 2e-6, 0.25, dense=False),
)


def test_a_step_is_a_decode_of_a_batch_or_a_prefill_of_tokens() -> None:
    decode = Budget("speed=1.25x", "H100", "decode:16")
    assert (decode.speed, decode.sequences, decode.tokens, decode.past) == (1.25, 16, 1, 512)
    prefill = Budget("speed=2", "H100", "prefill:2048")
    assert (prefill.speed, prefill.sequences, prefill.tokens, prefill.past) == (2.0, 1, 2048, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("1.2x", "H100", "decode:1"), "--budget '1.2x'"),
        (("speed=0.9x", "H100", "decode:1"), "--budget 'speed=0.9x'"),
        (("speed=1x", "H100", "decode:1"), "--budget 'speed=1x'"),
        (("speed=1.2x", "H100", "decode"), "--budget-step 'decode'"),
        (("speed=1.2x", "H100", "prefill:0"), "--budget-step 'prefill:0'"),
        (("speed=1.2x", "", "decode:1"), r"--budget speed=1\.2x without --budget-gpu"),
    ],
)
def test_what_cannot_be_read_is_refused(given: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(*given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_dense": 0.2}, "with --keep-dense"),
        ({"outlier_rows": 0.1}, "with --outlier-rows"),
    ],
)
def test_it_does_not_go_with_what_chooses_too(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.of(TWO_FOUR, budget="speed=1.1x", budget_gpu="H100", **options)


def test_its_options_need_it() -> None:
    with pytest.raises(UsageError, match="--budget-gpu without --budget"):
        PruneRequest.of(TWO_FOUR, budget_gpu="H100")


def test_a_record_has_its_options_and_no_path() -> None:
    request = PruneRequest.of(
        TWO_FOUR,
        budget="speed=1.1x",
        budget_gpu="H100",
        budget_measured="/some/where/h100.json",
        calib_forward="fp32",
    )
    record = request.to_json()
    assert record["budget"] == "speed=1.1x"
    assert record["budget_step"] == "decode:1"
    assert record["budget_measured"] == "h100.json"
    assert PruneRequest.from_json(record).to_json() == record
    assert not any(name.startswith("budget") for name in PruneRequest.of(TWO_FOUR).to_json())


def test_a_row_for_each_kind_of_choice() -> None:
    choices = Choices("seconds", 1e-5, "decode at batch 1 on H100 in bf16", 1.5, GROUPS, 3)
    assert [decision_cells(row) for row in decision_rows(choices)] == [
        ("mlp: gate, up", "1-2", "pruned", "0.004 ms (40.0%)", "0.3750"),
        ("mlp: gate, up", "0", "dense", "0.002 ms (20.0%)", "0.5000"),
        ("mlp.down", "0-1", "dense", "nothing", "0.7500"),
    ]
    assert choices.speed == pytest.approx(1 / 0.6)
    assert choices.fastest == pytest.approx(1 / 0.4)
    assert "1.67 times the speed of the dense model" in choices.sentence
    assert "3 of 5 groups of layers stay dense, 2 of them because" in choices.sentence


def test_of_weights_and_where_nothing_was_measured() -> None:
    groups = tuple(
        Choice(one.layers, 3e6, nan, dense=number < 1) for number, one in enumerate(GROUPS)
    )
    choices = Choices("weights", 15e6, "", 0.25, groups)
    rows = {row[:3]: row[3:] for row in map(decision_cells, decision_rows(choices))}
    assert rows["mlp: gate, up", "1-2", "pruned"] == ("6.00 M weights (40.0%)", "not measured")
    assert "20.0% of the weights" in choices.sentence


def test_numbers_and_names_in_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
    assert joined(["a.q", "b.k"]) == "a.q, b.k"
