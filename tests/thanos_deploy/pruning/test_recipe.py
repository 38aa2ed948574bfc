from typing import Any

import pytest

from exporters.options import ExportRequest
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.recipe import Recipe


@pytest.mark.parametrize(
    ("pattern", "tune_steps", "tuned"),
    [
        ("2:4", None, True),
        ("unstructured:0.5", None, True),
        ("2:4", 0, False),
        ("structured:0.3", None, False),
        ("structured:0.3", 4, True),
    ],
)
def test_columns_of_zeros_are_tuned_only_if_it_is_asked_for(
    pattern: str, tune_steps: int | None, tuned: bool
) -> None:
    given: dict[str, Any] = {} if tune_steps is None else {"tune_steps": tune_steps}
    recipe = Recipe.of(parse(pattern), **given)
    assert (recipe.walk.tune_steps > 0) == tuned
    assert recipe.walks_dense  # the preset's layers aim at the dense model's output


def test_graphs_that_were_made_before_there_was_a_choice_of_logits_are_not_made_again() -> None:
    recorded = {"dtype": "fp16", "max_sequence": 64}
    assert encode(decode(ExportRequest, recorded)) == recorded
    assert decode(ExportRequest, recorded).logits == "all"
    assert encode(ExportRequest(logits="last"))["logits"] == "last"
