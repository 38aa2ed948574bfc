import math

import pytest
import torch

from tests.conftest import VOCABULARY, MakeModel, stock_model
from thanos_deploy.measure.perplexity import perplexity


def test_equals_the_definition_in_float64(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"))
    segments = torch.randint(VOCABULARY, (3, 20))
    total = 0.0
    with torch.no_grad():
        for row in segments:
            logits = model(row[None]).logits[0].double()
            for position in range(19):
                total -= logits[position].log_softmax(0)[row[position + 1]].item()
    assert perplexity(model, segments).value == pytest.approx(math.exp(total / 57), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    make_model: MakeModel,
) -> None:
    model = stock_model(make_model("qwen2"))
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, torch.randint(VOCABULARY, (2, 600)))
    assert measured.value == pytest.approx(VOCABULARY, rel=1e-5)
    assert (measured.segments, measured.length) == (2, 600)
