import pytest
import torch
from torch import nn
from transformers import masking_utils

from runtime.static import attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_grouped_queries_attend_as_the_formula_says(heads: int, kv_heads: int, tokens: int) -> None:
    torch.manual_seed(0)
    batch, past, size = 3, 11, 8
    query = torch.randn(batch, heads, tokens, size)
    key, value = (torch.randn(batch, kv_heads, past, size) for _ in range(2))
    seen = torch.rand(batch, 1, tokens, past) < 0.7
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    found, _ = attention.attend(module, query, key, value, added, scaling=0.3)
    assert found.is_contiguous()
    of_head = torch.arange(heads) // (heads // kv_heads)
    scores = 0.3 * query.double() @ key.double()[:, of_head].mT
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    expected = (weights @ value.double()[:, of_head]).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_mask_is_made_of_finite_numbers() -> None:
    padded = torch.tensor([[False, True, True]])
    made = attention.mask(
        1, 3, 3, attention_mask=padded, dtype=torch.float16, allow_is_causal_skip=True
    )
    assert made is not None
    least = torch.finfo(torch.float16).min
    expected = torch.tensor([[least, least, least], [least, 0, least], [least, 0, 0]])
    assert made.dtype == torch.float16
    torch.testing.assert_close(made[0, 0].float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_prompt_without_padding_needs_no_mask(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: is_recorded)
    assert attention.mask(1, 3, 3, dtype=torch.float16) is None
    windowed = attention.mask(
        1,
        3,
        3,
        dtype=torch.float16,
        local_size=2,
        mask_function=masking_utils.sliding_window_causal_mask_function(2),
    )
    assert windowed is not None
    assert (windowed[0, 0] == 0).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]
