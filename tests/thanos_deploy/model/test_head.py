import pytest
import torch

from tests.conftest import EVERY_TYPE, VOCABULARY, MakeModel, stock_model
from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.head import head_of, last_states, read_head, require_plain_head

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", EVERY_TYPE)
@torch.no_grad()
def test_the_head_makes_the_logits_of_the_model(make_model: MakeModel, model_type: str) -> None:
    folder = make_model(model_type)
    model = stock_model(folder)
    expected = model(IDS).logits.flatten(0, 1)
    states = last_states(model, IDS)
    torch.testing.assert_close(head_of(model)(states), expected)
    torch.testing.assert_close(read_head(Checkpoint.open(folder))(states), expected)
    require_plain_head(model)


def test_logits_that_are_made_otherwise_are_refused(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"))
    model.config.final_logit_softcapping = 1.0  # which this type does not read
    with pytest.raises(ModelError, match="not the output of the output head"):
        require_plain_head(model)
